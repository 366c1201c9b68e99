"""The fused loss in sizes: the buffers and gradients that it would hold, the FLOPs that it would spend, and no arithmetic.

For planning on tensors that have shapes and no numbers. What is kept here in step with ``fused`` is the order in which that
one makes its buffers; their shapes come from its own functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.objectives.chunks import compute_dtype, default_chunk, narrowed, row_width, shared_bias, tile_rows
from limbeck.objectives.elementwise import STATS, Rows, elementwise_pass
from limbeck.objectives.fused import DistillationLoss, Objective, OutputHead, _Job, _said, _sums_dtype
from limbeck.objectives.payloads import Signal
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabParallel


class FusedSizes:
    """To be called as ``fused_linear_distillation`` is, wherever the tensors lie, as if they lay on ``device``.

    flops: of all products so far. moved: bytes that the elementwise passes would have read and written. chunk: rows that have
    logits at once.
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
        teacher: Signal | None = None,
        across: VocabParallel | None = None,
        compiled: bool | None = None,
        **_: Any,
    ) -> DistillationLoss:
        """A loss of no value whose backward pass hands over gradients of the right sizes."""
        job = _Job(
            objective,
            vocab_size if across is None else across.size,
            compute_dtype(student_hidden, student_head.weight),
            None,
            1.0,
            True,
            student_head.scale,
            student_head.softcap,
            teacher_head,
            teacher,
            None,
            NO_SHARDING if across is None else across,
            bool(compiled),
        )
        inputs = (student_hidden, student_head.weight, student_head.bias, teacher_hidden)
        loss = _Held.apply(*inputs, labels, job, self)
        return DistillationLoss(loss, *(loss.detach() for _ in STATS))


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        job: _Job,
        sizes: FusedSizes,
    ) -> Tensor:
        device, vocab, count, accumulate = sizes.device, job.vocab, len(hidden), job.accumulate
        w_s, b_s = weight[:vocab].to(job.dtype), shared_bias(bias, vocab, accumulate)
        w_t = None if job.teacher is None else job.teacher.weight[:vocab]
        b_t = None if job.teacher is None else shared_bias(job.teacher.bias, vocab, accumulate)
        chunk = max(1, min(default_chunk(device, vocab, count, w_s, w_t), count))
        wide = row_width(vocab, device)
        z_s = hidden.new_empty(chunk, wide, dtype=job.dtype)[:, :vocab]
        z_t = None if w_t is None else hidden.new_empty(chunk, wide, dtype=w_t.dtype)[:, :vocab]
        h_s = hidden.new_empty(chunk, hidden.shape[1], dtype=job.dtype)
        sums = _sums_dtype(job, weight, -(-count // chunk), device)
        needs = ctx.needs_input_grad
        grads = tuple(
            torch.zeros_like(like, dtype=dtype) if need and like is not None else None
            for need, like, dtype in zip(needs, (hidden, weight, bias), (sums, sums, accumulate), strict=False)
        )
        spec, index = job.spec(any(needs)), torch.arange(chunk)
        log_probs, columns, z_t = _said(job, index, z_t)
        sparse = columns is not None or (spec.topk > 0 and z_t is not None)
        # Compiled, a pass goes over the logits in place, unless it looks for the most likely or writes here and there: then it
        # makes about half of what it makes uncompiled, which is what is counted.
        if not job.compiled or sparse:
            tile = tile_rows(job.compiled, z_s, z_t, device)
            teacher, log_probs, columns = (None if x is None else x[:tile] for x in (z_t, log_probs, columns))
            ones = torch.ones(len(z_s[:tile]), 1, dtype=accumulate)
            tensors = Rows(z_s[:tile], b_s, teacher, b_t, log_probs, columns, labels[:tile], ones, torch.ones(()))
            elementwise_pass(spec, job.across)(*tensors)
        if grads[0] is not None:
            grads[0][:chunk] = torch.empty_like(h_s).to(sums)
            grads = (job.across.sum(grads[0]), *grads[1:])
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
