"""The computation of the fused loss: chunks of logits, the elementwise pass over them, and the gradients of its inputs.

A chunk's logits are one matrix product into a buffer that all chunks share. The elementwise pass writes the gradient over the
student's logits. Two more products add it to the gradients of the hidden states and of the head. The peak memory is that of one
chunk, whatever the number of positions. Within a chunk, the elementwise pass works on tiles that fit the processor's cache.

Shapes: N positions, V vocabulary, H hidden size (it may differ between student and teacher), n positions of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.objectives.aligned_head import AlignedHead
from limbeck.objectives.chunks import default_chunk, keep_freed_tiles, narrowed, rescale, shared_bias, tile_rows
from limbeck.objectives.compilation import CompiledPass
from limbeck.objectives.divergences import LOWEST
from limbeck.objectives.elementwise import STATS, ElementwiseSpec, TileInputs, elementwise_pass
from limbeck.objectives.first_order import first_order_only
from limbeck.objectives.kernels import kernel_pass
from limbeck.objectives.objective import Objective
from limbeck.objectives.output_head import LogitTransform, OutputHead
from limbeck.objectives.payloads import Logits, Sampled, SignalPayload, TopK
from limbeck.objectives.policy_gradient import RolloutTokens
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabParallel, VocabReducer

_NARROW_CHUNKS = {"cuda": 8}  # so many bfloat16 chunks at most are summed in bfloat16; see ``grad_dtype``


@dataclass(frozen=True)
class FusedOptions:
    """The arguments of a fused loss that are not differentiated, after checks and defaults.

    vocab: columns of this rank. dtype: of the matrix products. teacher: the head of a teacher that gives hidden states.
    fp16_scale: a power of two by which float16 gradients of the logits are multiplied, so that they do not underflow.
    """

    objective: Objective
    vocab: int
    dtype: torch.dtype
    student: LogitTransform
    teacher: OutputHead | None = None
    signal: SignalPayload | None = None
    weights: Tensor | None = None
    normalizer: float | Tensor = 1.0
    chunk_size: int | None = None
    wants_grad: bool = True
    reducer: VocabReducer = NO_SHARDING
    compiled: bool = False
    fp16_scale: float | Tensor = 1.0
    rollout: RolloutTokens | None = None

    @property
    def whole_vocab(self) -> int:
        """Columns of all ranks together."""
        return self.reducer.vocab_size if isinstance(self.reducer, VocabParallel) else self.vocab

    @property
    def logit_grad_scale(self) -> float | Tensor:
        """The factor of the logits' gradient: 1/normalizer, or ``fp16_scale`` in float16, where 1/normalizer underflows."""
        return self.fp16_scale if self.dtype is torch.float16 else 1.0 / self.normalizer

    @property
    def param_grad_scale(self) -> float | Tensor:
        """The factor of the summed gradients that ``logit_grad_scale`` leaves out."""
        return 1.0 / (self.normalizer * self.fp16_scale) if self.dtype is torch.float16 else 1.0

    @property
    def accumulate(self) -> torch.dtype:
        """The precision of everything but the matrix products."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def spec(self, wants_grad: bool) -> ElementwiseSpec:
        """The configuration of the elementwise pass."""
        objective = self.objective
        if objective.topk >= self.whole_vocab:
            objective = replace(objective, topk=0)
        return ElementwiseSpec(
            objective=objective,
            student=self.student,
            teacher=LogitTransform() if self.teacher is None else self.teacher.transform,
            wants_grad=wants_grad,
            dtype=self.accumulate,
            retempered=objective.teacher_temperature / self.signal.temperature
            if isinstance(self.signal, TopK)
            else 1.0,
            rollout_temperature=None if self.rollout is None else self.rollout.temperature,
            clip=None if self.rollout is None else self.rollout.clip,
        )


class FusedHeadLoss(torch.autograd.Function):
    """(hidden, weight, bias, ...) → (loss, stats). The forward pass forms the gradients; the first backward returns them.

    A further backward (``retain_graph=True``) forms them again, so that no second copy of the head's size is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        rows: Tensor,
        options: FusedOptions,
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(options.wants_grad and need for need in ctx.needs_input_grad[:3])
        loss, stats, grads = _process_chunks(hidden, weight, bias, teacher_hidden, labels, rows, options, needs)
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden, labels, rows)
        ctx.options, ctx.needs, ctx.grads = options, needs, grads
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0] * ctx.options.param_grad_scale
        grads, ctx.grads = ctx.grads, None
        hidden, weight, bias, teacher_hidden, labels, rows = ctx.saved_tensors
        if grads is None:
            grads = _process_chunks(hidden, weight, bias, teacher_hidden, labels, rows, ctx.options, ctx.needs)[2]
        # Reading the scale saves a pass over the head's gradient on a CPU; on a GPU it would be a sync.
        if scale.device.type != "cpu" or scale.item() != 1.0:
            for grad in grads:
                if grad is not None:
                    rescale(grad, scale)
        cast = [
            None if g is None else narrowed(g, like.dtype)
            for g, like in zip(grads, (hidden, weight, bias), strict=True)
        ]
        return (*cast, None, None, None, None)


def _process_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    options: FusedOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return loss, diagnostics, and the gradients of hidden, weight and bias where ``needs`` is set.

    The gradients still have to be multiplied by ``options.param_grad_scale``. rows: the supervised positions.
    """
    device, vocab, count, accumulate = hidden.device, options.vocab, rows.numel(), options.accumulate
    reducer = options.reducer
    head_s = AlignedHead(weight, vocab, options.dtype)
    b_s = shared_bias(bias, vocab, accumulate)
    # The teacher's head keeps its own precision: a converted copy of it may be larger than the student.
    head_t = (
        None if options.teacher is None else AlignedHead(options.teacher.weight, vocab, options.teacher.weight.dtype)
    )
    b_t = None if options.teacher is None else shared_bias(options.teacher.bias, vocab, accumulate)

    if device.type == "cpu":
        keep_freed_tiles()
    chunk = options.chunk_size or default_chunk(
        device, vocab, count, head_s.main, None if head_t is None else head_t.main
    )
    chunk = max(1, min(chunk, count))
    z_s = head_s.buffer(chunk)
    z_t = None if head_t is None else head_t.buffer(chunk)
    tile = tile_rows(options.compiled, z_s, z_t, device)
    spec = options.spec(any(needs))
    plain, fast = elementwise_pass(spec, reducer), None
    if options.compiled:
        torch_only = isinstance(options.signal, TopK | Sampled) or rollout_rows(options, rows[:0])[0] is not None
        kernel = None if torch_only else kernel_pass(spec, reducer, device)
        fast = kernel or CompiledPass(spec, reducer)
        tile = tile if kernel is None else chunk

    sums = grad_dtype(options, weight, -(-count // chunk), device)
    d_hidden = torch.zeros(hidden.shape, dtype=sums, device=device) if needs[0] else None
    d_weight = (torch.empty if count else torch.zeros)(weight.shape, dtype=sums, device=device) if needs[1] else None
    d_bias = torch.zeros(weight.shape[0], dtype=accumulate, device=device) if needs[2] else None
    stats = torch.zeros(len(STATS), dtype=accumulate, device=device)
    factor = _scalar(options.logit_grad_scale, accumulate, device)

    for start in range(0, count, chunk):
        index = rows[start : start + chunk]
        n, target = index.numel(), labels[index]
        h_s = hidden[index].to(options.dtype)
        zs = head_s.logits(h_s, z_s[:n])
        zt = None
        if head_t is not None and z_t is not None and teacher_hidden is not None:
            zt = head_t.logits(teacher_hidden[index].to(z_t.dtype), z_t[:n])
        log_probs, columns, zt = signal_rows(options, index, zt)
        written, advantages, log_q = rollout_rows(options, index)
        weights = torch.ones(n, 1, dtype=accumulate, device=device)
        if options.weights is not None:
            weights = options.weights[index].to(accumulate).unsqueeze(-1)
        for low in range(0, n, tile):
            part = slice(low, low + tile)
            lp, ix, t, *of_rollout = (
                None if x is None else x[part] for x in (log_probs, columns, zt, written, advantages, log_q)
            )
            inputs = TileInputs(zs[part], b_s, t, b_t, lp, ix, target[part], weights[part], factor, *of_rollout)
            tile_stats, tile_d_bias = plain(*inputs) if fast is None else fast(plain, inputs)
            stats += tile_stats
            if d_bias is not None and tile_d_bias is not None:
                d_bias[:vocab] += tile_d_bias
        if log_q is not None and options.rollout is not None and options.rollout.student_log_probs is not None:
            options.rollout.student_log_probs[index] = log_q.squeeze(-1).to(options.rollout.student_log_probs.dtype)
        if d_hidden is not None:
            d_hidden[index] = head_s.hidden_grad(z_s[:n]).to(sums)
        if d_weight is not None:
            head_s.add_weight_grad(d_weight, z_s[:n], h_s, first=start == 0)

    if d_hidden is not None:
        d_hidden = reducer.sum(d_hidden)  # every rank's slice of the vocabulary contributes to the same hidden states
    stats /= options.normalizer
    w = options.objective.kd_weight
    squared = options.objective.temperature**2 if options.objective.squared else 1.0
    if w == 0:
        loss = stats[1]
    elif options.objective.policy_gradient:
        loss = (1 - w) * stats[1]
    else:
        loss = (1 - w) * stats[1] + w * squared * stats[0]
    if options.rollout is not None:
        loss = loss + stats[STATS.index("policy")]
    return loss, stats, (d_hidden, d_weight, d_bias)


def signal_rows(
    options: FusedOptions, index: Tensor, zt: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return log-probabilities, token indices and logits of the signal at the positions ``index``, or ``zt`` without one."""
    signal = options.signal
    if isinstance(signal, TopK):
        log_probs = signal.at(options.objective.teacher_temperature, options.objective.tail)
        return log_probs[index].to(options.accumulate).clamp_min(LOWEST), signal.indices[index], None
    if isinstance(signal, Sampled):
        return signal.log_probs[index].to(options.accumulate).clamp_min(LOWEST).unsqueeze(-1), None, None
    if isinstance(signal, Logits):
        return None, None, signal.logits[index][:, : options.vocab].to(options.accumulate).clamp_min(LOWEST)
    return None, None, zt


def rollout_rows(options: FusedOptions, index: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """At the positions ``index``, [n, 1] each: log q_w and advantages, None without a policy gradient, and room for log q."""
    rollout, dtype = options.rollout, options.accumulate
    if rollout is None:
        return None, None, None
    written = advantages = log_q = None
    if rollout.advantages is not None or options.objective.policy_gradient:
        written = rollout.log_probs[index].to(dtype).unsqueeze(-1)
    if rollout.advantages is not None:
        advantages = rollout.advantages[index].to(dtype).unsqueeze(-1)
    if rollout.student_log_probs is not None:
        log_q = torch.empty(len(index), 1, dtype=dtype, device=index.device)
    return written, advantages, log_q


def grad_dtype(options: FusedOptions, weight: Tensor, chunks: int, device: torch.device) -> torch.dtype:
    """The precision in which the gradients of the chunks are summed: ``accumulate``, or bfloat16 for few chunks on a GPU.

    A product is summed in float32 and rounded once. If everything is bfloat16, adding a few chunks in bfloat16 costs little
    more than the final rounding, and saves a float32 copy of twice the gradient's size.
    """
    bfloat16 = options.dtype is weight.dtype is torch.bfloat16 and options.reducer is NO_SHARDING
    narrow = bfloat16 and chunks <= _NARROW_CHUNKS.get(device.type, 0)
    return torch.bfloat16 if narrow else options.accumulate


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``value`` on the device. A GPU writes a number itself; ``torch.as_tensor`` would copy it, for which the host waits."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def fp16_grad_scale(objective: Objective, scale: float, weights: Tensor | None) -> float | Tensor:
    """A power of two that brings the largest coefficient of a row's gradient to about 1, which float16 represents well."""
    w, tau = objective.kd_weight, objective.temperature
    coefficient = abs(scale) * ((1 - w) + w * (tau if objective.squared else 1 / tau))
    if weights is None or weights.numel() == 0:
        return 2.0 ** max(0, math.floor(-math.log2(coefficient)))
    largest = (weights.float().abs().amax() * coefficient).clamp_min(1e-30)
    return torch.exp2((-largest.log2()).floor().clamp_min(0))
