"""The output head and the loss in one pass: hidden states of both models in, loss and gradients out, logits never stored whole.

The supervised positions are walked in chunks. A chunk's logits are one matrix product into a buffer that is made once; the
gradient is written over them; two more matrix products leave it behind for the hidden states and the head. Peak memory is one
chunk, whatever the number of tokens. Inside a chunk the elementwise work goes in tiles that stay in the processor's cache.

    loss = [ (1 − w) Σ CE  +  w Σ D(p, q) ] / normalizer        p = softmax(z_t / τ_t),  q = softmax(z_s / τ_s)

Cross-entropy is that of the untempered student. Nothing here knows a model, a batch or a teacher's whereabouts.

Shapes: N positions, V vocabulary, H hidden size (student's and teacher's may differ), C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.objectives.divergences import LOWEST, Formulas, formulas

IGNORE = -100

_CHUNK_BYTES = {"cpu": 112 << 20, "cuda": 1 << 30}
_WHOLE_ROWS, _WHOLE_BYTES = 1024, 256 << 20  # a small vocabulary takes so many rows at once: products like them large
_TILE_ELEMENTS = 1 << 19  # with some eight float32 temporaries this is 16 MiB: about the cache of two cores


@dataclass(frozen=True)
class OutputHead:
    """What turns a hidden state into logits: ``softcap · tanh(scale · (h Wᵀ + b) / softcap)``.

    weight: [V, H]; rows beyond the shared vocabulary (padding) may be there and are never computed.
    bias: [V] or None. softcap: Gemma's final soft-cap or None. scale: Cohere's and Granite's logit scale.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Objective:
    """What is minimised, in numbers: see the module's formula.

    kd_weight w in [0, 1]; terms: the divergence's two formulas; temperature τ_s; teacher_temperature τ_t; squared: multiply
    the divergence by τ_s²; topk: 0 for the whole vocabulary, else both distributions are renormalised over the teacher's k
    most likely tokens (the mass outside is invisible to the divergence, as in ROLL).
    """

    terms: Formulas
    kd_weight: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    squared: bool = False
    topk: int = 0

    @classmethod
    def of(
        cls,
        name: str = "forward_kl",
        *,
        kd_weight: float = 0.5,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        squared: bool = False,
        topk: int = 0,
        parameters: Mapping[str, float] | None = None,
    ) -> Objective:
        """The objective with the divergence called ``name``, given its ``parameters``; unset, τ_t = τ_s.

        Raises LimbeckError for impossible numbers.
        """
        if not 0 <= kd_weight <= 1:
            raise LimbeckError(f"kd_weight must be in [0, 1], got {kd_weight}.")
        tau_t = temperature if teacher_temperature is None else teacher_temperature
        if not (temperature > 0 and tau_t > 0):
            raise LimbeckError(f"temperatures must be above 0, got {temperature} (student) and {tau_t} (teacher).")
        if topk < 0:
            raise LimbeckError(f"logits_topk must be 0 (the whole vocabulary) or more, got {topk}.")
        return cls(formulas(name, **(parameters or {})), kd_weight, temperature, tau_t, squared, topk)


class DistillationLoss(NamedTuple):
    """``loss`` backpropagates; the rest are detached scalars on the device, each a sum over supervised tokens ÷ normalizer.

    kd: the divergence; ce: cross-entropy; entropies in nats of q and p as the divergence sees them; top1_agreement: share of
    positions where both models' most likely token is the same. kd, teacher_entropy and top1_agreement are 0 without a teacher.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor


def fused_linear_distillation(
    student_hidden: Tensor,
    student_head: Tensor | OutputHead,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | OutputHead | None,
    labels: Tensor,
    *,
    objective: str | Objective = "forward_kl",
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    all_supervised: bool = False,
) -> DistillationLoss:
    """Cross-entropy and distillation from the last hidden states, without ever holding [N, V] logits.

    student_hidden [N, Hs], student_head [V, Hs], teacher_hidden [N, Ht], teacher_head [V', Ht], labels [N] with −100 where
    nothing is learned. labels[i] is the token that position i must predict: shift before calling. Heads are weight matrices
    or ``OutputHead`` when there is a bias, soft-cap or scale. Both teacher arguments may be None when kd_weight is 0.

    objective: a divergence's name, or an ``Objective`` (then kd_weight and the temperatures are taken from it).
    vocab_size: the shared vocabulary; default the smaller head. Rows beyond it do not exist for the loss.
    normalizer: what the sums are divided by; default the number of supervised positions.
    all_supervised: the caller's word that no label is −100, which saves a GPU from counting them.
    chunk_size: positions per chunk; default as many as fit in 112 MiB of logits on a CPU (1024 if these
    fit in 256 MiB), 1 GiB on a GPU.

    Half-precision inputs are multiplied in half precision and everything else is float32; float64 stays float64. Gradients
    reach student_hidden and the student's head (weight and bias) when they require them; none is formed otherwise.
    """
    if not isinstance(objective, Objective):
        objective = Objective.of(
            objective, kd_weight=kd_weight, temperature=temperature, teacher_temperature=teacher_temperature
        )
    student = student_head if isinstance(student_head, OutputHead) else OutputHead(student_head)
    teacher = teacher_head if isinstance(teacher_head, OutputHead) or teacher_head is None else OutputHead(teacher_head)
    if objective.kd_weight > 0 and (teacher is None or teacher_hidden is None):
        raise LimbeckError(
            "kd_weight is above 0 but there is no teacher; give teacher_hidden and teacher_head, or kd_weight=0."
        )
    widest = student.weight.shape[0] if teacher is None else min(student.weight.shape[0], teacher.weight.shape[0])
    vocab = widest if vocab_size is None else vocab_size
    if not 0 < vocab <= widest:
        raise LimbeckError(
            f"vocab_size={vocab_size} is not between 1 and the {widest} rows of the smaller output head."
        )

    dtype = _compute_dtype(student_hidden, student.weight)
    everything = torch.arange(labels.numel(), device=labels.device)
    rows = everything if all_supervised else everything[labels != IGNORE]
    if normalizer is None:
        normalizer = max(rows.numel(), 1)
    wants_grad = torch.is_grad_enabled()
    job = _Job(objective, vocab, dtype, chunk_size, normalizer, wants_grad, student.softcap, student.scale)
    loss, stats = _HeadAndLoss.apply(
        student_hidden, student.weight, student.bias, teacher_hidden, teacher, labels, rows, job
    )
    kd, ce, student_entropy, teacher_entropy, agreement = stats.unbind()
    return DistillationLoss(loss, kd, ce, student_entropy, teacher_entropy, agreement)


@dataclass(frozen=True)
class _Job:
    objective: Objective
    vocab: int
    dtype: torch.dtype
    chunk_size: int | None
    normalizer: float | Tensor
    wants_grad: bool
    softcap: float | None
    scale: float

    @property
    def inside(self) -> float | Tensor:
        """The part of 1/normalizer that goes into the logits' gradient: none in float16, which would underflow."""
        return 1.0 if self.dtype is torch.float16 else 1.0 / self.normalizer

    @property
    def rest(self) -> float | Tensor:
        """The part of 1/normalizer that is left for the summed gradients."""
        return 1.0 / self.normalizer if self.dtype is torch.float16 else 1.0


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


@dataclass(frozen=True)
class _Teacher:
    """The teacher's side of a walk: hidden [N, Ht], the head's rows of the shared vocabulary [V, Ht], and what follows them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    head: OutputHead

    @classmethod
    def of(cls, head: OutputHead, hidden: Tensor, vocab: int, dtype: torch.dtype) -> _Teacher:
        bias = None if head.bias is None else head.bias[:vocab].to(dtype).clamp_min(LOWEST)
        return cls(hidden, head.weight[:vocab], bias, head)

    def product(self, index: Tensor, buffer: Tensor) -> Tensor:
        return torch.mm(self.hidden[index].to(self.weight.dtype), self.weight.t(), out=buffer[: index.numel()])

    def logits(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        return _logits(z, self.bias, self.head.scale, self.head.softcap, dtype)


class _HeadAndLoss(torch.autograd.Function):
    """Gradients are formed in the forward pass, where the logits are, and handed over by the first backward.

    A further backward (``retain_graph=True``) forms them again rather than keep a second copy of the head's size alive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher: OutputHead | None,
        labels: Tensor,
        rows: Tensor,
        job: _Job,
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(job.wants_grad and need for need in ctx.needs_input_grad[:3])
        loss, stats, grads = _walk(hidden, weight, bias, teacher_hidden, teacher, labels, rows, job, needs)
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden, labels, rows)
        ctx.teacher, ctx.job, ctx.needs, ctx.grads = teacher, job, needs, grads
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0] * ctx.job.rest
        grads, ctx.grads = ctx.grads, None
        hidden, weight, bias, teacher_hidden, labels, rows = ctx.saved_tensors
        if grads is None:
            grads = _walk(hidden, weight, bias, teacher_hidden, ctx.teacher, labels, rows, ctx.job, ctx.needs)[2]
        # On a CPU reading the scale costs nothing and saves a pass over the head's gradient; on a GPU it would be a sync.
        if scale.device.type != "cpu" or scale.item() != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(scale)
        cast = [None if g is None else g.to(like.dtype) for g, like in zip(grads, (hidden, weight, bias), strict=True)]
        return (*cast, None, None, None, None, None)


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher: OutputHead | None,
    labels: Tensor,
    rows: Tensor,
    job: _Job,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Loss, diagnostics, and the gradients (``job.inside`` of them) for hidden, weight and bias where ``needs`` says so."""
    device, vocab, count = hidden.device, job.vocab, rows.numel()
    accumulate = torch.float64 if job.dtype is torch.float64 else torch.float32
    w_s = weight[:vocab].to(job.dtype)
    b_s = None if bias is None else bias[:vocab].to(accumulate).clamp_min(LOWEST)
    # A teacher far larger than the student keeps the precision that it was loaded in.
    asked = (
        None if teacher is None or teacher_hidden is None else _Teacher.of(teacher, teacher_hidden, vocab, accumulate)
    )

    chunk = job.chunk_size or _default_chunk(device, vocab, w_s, None if asked is None else asked.weight)
    chunk = max(1, min(chunk, count))
    z_s = torch.empty(chunk, vocab, dtype=job.dtype, device=device)
    z_t = None if asked is None else torch.empty(chunk, vocab, dtype=asked.weight.dtype, device=device)
    tile = max(1, _TILE_ELEMENTS // vocab) if device.type == "cpu" else chunk

    d_hidden = torch.zeros(hidden.shape, dtype=accumulate, device=device) if needs[0] else None
    d_weight = torch.zeros(weight.shape, dtype=accumulate, device=device) if needs[1] else None
    d_bias = torch.zeros(weight.shape[0], dtype=accumulate, device=device) if needs[2] else None
    stats = torch.zeros(5, dtype=accumulate, device=device)

    for start in range(0, count, chunk):
        index = rows[start : start + chunk]
        n, target = index.numel(), labels[index]
        h_s = hidden[index].to(job.dtype)
        zs = torch.mm(h_s, w_s.t(), out=z_s[:n])
        zt = None if asked is None or z_t is None else asked.product(index, z_t)
        for low in range(0, n, tile):
            part = slice(low, low + tile)
            logits_t = None if asked is None or zt is None else asked.logits(zt[part], accumulate)
            _tile(zs[part], b_s, logits_t, target[part], job, stats, any(needs), accumulate, d_bias)
        if d_hidden is not None:
            d_hidden[index] = torch.mm(zs, w_s).to(accumulate)
        if d_weight is not None:
            _accumulate(d_weight[:vocab], zs, h_s)

    stats /= job.normalizer
    w = job.objective.kd_weight
    squared = job.objective.temperature**2 if job.objective.squared else 1.0
    loss = (1 - w) * stats[1] + w * squared * stats[0]
    return loss, stats, (d_hidden, d_weight, d_bias)


def _default_chunk(device: torch.device, vocab: int, w_s: Tensor, w_t: Tensor | None) -> int:
    per_row = vocab * (w_s.element_size() + (0 if w_t is None else w_t.element_size()))
    if device.type == "cpu" and _WHOLE_ROWS * per_row <= _WHOLE_BYTES:
        return _WHOLE_ROWS
    rows = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // per_row
    return max(16, rows // 16 * 16)


def _accumulate(d_weight: Tensor, dz: Tensor, h: Tensor) -> None:
    """d_weight [V, H] += dzᵀ h, summed in d_weight's precision, without a second buffer of the head's size."""
    if dz.dtype == d_weight.dtype:
        d_weight.addmm_(dz.t(), h)
        return
    step = max(1, (1 << 22) // d_weight.shape[1])
    for low in range(0, d_weight.shape[0], step):
        d_weight[low : low + step] += torch.mm(dz[:, low : low + step].t(), h)


def _logits(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None, dtype: torch.dtype) -> Tensor:
    z = z.to(dtype)
    if bias is not None:
        z = z + bias
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _tile(
    z: Tensor,
    bias: Tensor | None,
    teacher_logits: Tensor | None,
    target: Tensor,
    job: _Job,
    stats: Tensor,
    wants_grad: bool,
    dtype: torch.dtype,
    d_bias: Tensor | None,
) -> None:
    """One tile of rows: adds to ``stats`` and, if wanted, writes the gradient of h·Wᵀ over ``z``."""
    objective, w = job.objective, job.objective.kd_weight
    tau = objective.temperature
    logits = _logits(z, bias, job.scale, job.softcap, dtype)
    target = target.unsqueeze(-1)
    log_q1, q1 = _log_and_softmax(logits)
    stats[1] -= log_q1.gather(-1, target).sum()
    q, log_q = q1, log_q1
    weight = None
    if teacher_logits is not None:
        best = teacher_logits.argmax(-1, keepdim=True)
        stats[4] += (logits.gather(-1, best).squeeze(-1) == logits.amax(-1)).sum()
        if objective.topk and objective.topk < job.vocab:
            kept, columns = teacher_logits.topk(objective.topk, dim=-1)
            log_p, p = _log_and_softmax(kept / objective.teacher_temperature)
            log_q, q = _log_and_softmax(logits.gather(-1, columns) / tau)
        else:
            columns = None
            tau_t = objective.teacher_temperature
            log_p, p = _log_and_softmax(teacher_logits if tau_t == 1.0 else teacher_logits / tau_t)
            if tau != 1.0:
                log_q, q = _log_and_softmax(logits / tau)
        stats[3] -= torch.linalg.vecdot(p, log_p).sum()
        value, weight = objective.terms(p, q, log_p, log_q)
        stats[0] += value.sum()
    stats[2] -= torch.linalg.vecdot(q, log_q).sum()
    if not wants_grad:
        return

    k = job.inside * job.scale
    # k times ∂/∂logits of (1 − w) CE + w τ² D, as [c_q q1 − (1 − w) onehot] + c (weight − q Σ weight)
    if weight is None or w == 0:
        gradient = q1 * ((1 - w) * k)
    else:
        c = w * (tau if objective.squared else 1 / tau) * k
        total = weight.sum(-1, keepdim=True)
        if columns is None and tau == 1.0:
            gradient = torch.addcmul(weight * c, q1, (1 - w) * k - c * total)
        else:
            share = (weight - q * total) * c
            gradient = q1 * ((1 - w) * k)
            gradient = gradient + share if columns is None else gradient.scatter_add(-1, columns, share)
    if w < 1:
        gradient.scatter_add_(-1, target, torch.ones_like(target, dtype=dtype) * (-(1 - w) * k))
    if job.softcap is not None:
        gradient = gradient * (1 - (logits / job.softcap) ** 2)
    if d_bias is not None:
        d_bias[: job.vocab] += gradient.sum(0)
    z.copy_(gradient)


def _log_and_softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax and softmax with one exponential per entry: the largest entry's probability tells the log-sum-exp."""
    probability = z.softmax(-1)
    log_sum = z.amax(-1, keepdim=True) - probability.amax(-1, keepdim=True).log()
    return z - log_sum, probability
