"""Memory and FLOPs of the fused loss, for tensors that have shapes but no values (fake tensors).

``FusedSizes`` allocates the buffers and gradients of ``fused_autograd`` in the same order, with the same functions, and
computes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.objectives.aligned_head import AlignedHead
from limbeck.objectives.chunks import compute_dtype, default_chunk, narrowed, shared_bias, tile_rows
from limbeck.objectives.elementwise import STATS, TileInputs, elementwise_pass
from limbeck.objectives.fused_autograd import FusedOptions, grad_dtype, signal_rows
from limbeck.objectives.objective import DistillationLoss, Objective
from limbeck.objectives.output_head import OutputHead
from limbeck.objectives.payloads import SignalPayload
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabParallel


class FusedSizes:
    """A stand-in for ``fused_linear_distillation`` that measures, for tensors on any device, a run on ``device``.

    Attributes:
        flops: of all matrix products so far.
        moved: bytes that the elementwise passes read and write.
        chunk: positions whose logits are held at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flops = self.moved = self.chunk = 0

    def __call__(
        self,
        student_hidden: Tensor,
        student_head: OutputHead,
        teacher_hidden: Tensor | None,
        teacher_head: OutputHead | None,
        labels: Tensor,
        *,
        objective: Objective,
        vocab_size: int,
        teacher: SignalPayload | None = None,
        reducer: VocabParallel | None = None,
        compiled: bool | None = None,
        **_: Any,
    ) -> DistillationLoss:
        """Return a loss of 0 whose backward pass returns gradients of the right sizes."""
        options = FusedOptions(
            objective,
            vocab_size if reducer is None else reducer.size,
            compute_dtype(student_hidden, student_head.weight),
            student_head.transform,
            teacher_head,
            teacher,
            reducer=NO_SHARDING if reducer is None else reducer,
            compiled=bool(compiled),
        )
        inputs = (student_hidden, student_head.weight, student_head.bias, teacher_hidden)
        loss = _AllocateOnly.apply(*inputs, labels, options, self)
        return DistillationLoss(loss, *(loss.detach() for _ in STATS))


class _AllocateOnly(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        options: FusedOptions,
        sizes: FusedSizes,
    ) -> Tensor:
        device, vocab, count, accumulate = sizes.device, options.vocab, len(hidden), options.accumulate
        head_s, b_s = AlignedHead(weight, vocab, options.dtype, device), shared_bias(bias, vocab, accumulate)
        teacher_head = options.teacher
        head_t = None
        if teacher_head is not None:
            head_t = AlignedHead(teacher_head.weight, vocab, teacher_head.weight.dtype, device)
        b_t = None if options.teacher is None else shared_bias(options.teacher.bias, vocab, accumulate)
        w_t = None if head_t is None else head_t.main
        chunk = max(1, min(default_chunk(device, vocab, count, head_s.main, w_t), count))
        z_s = head_s.buffer(chunk)[:, :vocab]
        z_t = None if head_t is None else head_t.buffer(chunk)[:, :vocab]
        h_s = hidden.new_empty(chunk, hidden.shape[1], dtype=options.dtype)
        sums = grad_dtype(options, weight, -(-count // chunk), device)
        needs = ctx.needs_input_grad
        grads = tuple(
            torch.zeros_like(like, dtype=dtype) if need and like is not None else None
            for need, like, dtype in zip(needs, (hidden, weight, bias), (sums, sums, accumulate), strict=False)
        )
        spec, index = options.spec(any(needs)), torch.arange(chunk)
        log_probs, columns, z_t = signal_rows(options, index, z_t)
        sparse = columns is not None or (spec.objective.topk > 0 and z_t is not None)
        # A compiled pass works in place, unless it needs a top-k or scatters. Then it allocates about half of what the plain
        # pass does; the plain pass is what is counted.
        if not options.compiled or sparse:
            tile = tile_rows(options.compiled, z_s, z_t, device)
            teacher, log_probs, columns = (None if x is None else x[:tile] for x in (z_t, log_probs, columns))
            ones = torch.ones(len(z_s[:tile]), 1, dtype=accumulate)
            tensors = TileInputs(z_s[:tile], b_s, teacher, b_t, log_probs, columns, labels[:tile], ones, torch.ones(()))
            elementwise_pass(spec, options.reducer)(*tensors)
        if grads[0] is not None:
            grads[0][:chunk] = torch.empty_like(h_s).to(sums)
            grads = (options.reducer.sum(grads[0]), *grads[1:])
        teacher_width = 0 if w_t is None else w_t.shape[1]
        sizes.chunk = chunk
        sizes.flops += 2 * count * vocab * (hidden.shape[1] * (1 + needs[0] + needs[1]) + teacher_width)
        # The pass reads both logits and writes the gradient over the student's.
        sizes.moved += count * vocab * (2 * z_s.itemsize + (0 if z_t is None else z_t.itemsize))
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden, labels)
        ctx.grads = grads
        return hidden.new_zeros((), dtype=accumulate)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        cast = [
            None if grad is None else narrowed(grad, like.dtype)
            for grad, like in zip(grads, ctx.saved_tensors, strict=False)
        ]
        return (*cast, None, None, None, None)
