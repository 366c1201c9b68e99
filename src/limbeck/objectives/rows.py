"""What happens to a tile of logits: both log-sum-exps, value, diagnostics, and the gradient written over the student's logits.

One function of tensors for every divergence, head and signal. It runs as it stands or compiled, and on a slice of the
vocabulary when ``Across`` sums over the ranks that hold the others.

Shapes: n rows, V columns of the vocabulary (or of this rank's slice), k columns of a sparse signal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.objectives.across import WHOLE, Across
from limbeck.objectives.divergences import LOWEST, Formulas, evaluate

STATS = ("kd", "ce", "student_entropy", "teacher_entropy", "top1_agreement", "topk_mass", "topk_overlap")
ZERO_TAIL = -100.0  # NeMo-RL's log-probability of what the teacher left out


@dataclass(frozen=True)
class Spec:
    """Everything about the pass that is not a tensor; see ``Objective`` and ``OutputHead`` for the fields' meaning."""

    terms: Formulas
    sampled: bool
    kd_weight: float
    temperature: float
    teacher_temperature: float
    squared: bool
    topk: int
    tail: str
    scale: float
    softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    wants_grad: bool
    dtype: torch.dtype


class Rows(NamedTuple):
    """The tensors of a tile. z [n, V]: the student's products, overwritten by their gradient. bias [V] or None.

    teacher [n, V], teacher_bias [V]: the same for the teacher. log_probs [n, k] and indices [n, k]: a sparse signal;
    log_probs [n, 1] without indices: of the labels alone. target [n]. weight [n, 1]: what multiplies each row's loss.
    factor: the 0-dimensional share of 1/normalizer that goes into the gradient.
    """

    z: Tensor
    bias: Tensor | None
    teacher: Tensor | None
    teacher_bias: Tensor | None
    log_probs: Tensor | None
    indices: Tensor | None
    target: Tensor
    weight: Tensor
    factor: Tensor


Pass = Callable[..., "tuple[Tensor, Tensor | None]"]


@lru_cache(maxsize=32)
def row_pass(spec: Spec, across: Across = WHOLE, compiled: bool = False) -> Pass:
    """The function (*Rows) → (stats [len(STATS)], gradient of the bias [V] or None) for ``spec``."""

    def run(*tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _run(Rows(*tensors), spec, across)  # type: ignore[arg-type]

    return torch.compile(run) if compiled else run


def _run(rows: Rows, spec: Spec, across: Across) -> tuple[Tensor, Tensor | None]:
    w, tau = spec.kd_weight, spec.temperature
    s = _logits(rows.z, rows.bias, spec.scale, spec.softcap, spec.dtype)
    t = None
    if rows.teacher is not None:
        t = _logits(rows.teacher, rows.teacher_bias, spec.teacher_scale, spec.teacher_softcap, spec.dtype)

    # Two reductions give every normaliser: the maxima, then the sums of exponentials.
    highest = s.amax(-1, keepdim=True)
    if t is None:
        highest = across.max(highest)
    else:
        highest, highest_t = across.max(torch.cat([highest, t.amax(-1, keepdim=True)], -1)).split(1, -1)
    shifted = s - highest
    q1 = shifted.exp()
    sums = [q1.sum(-1, keepdim=True), across.share(s, rows.target.unsqueeze(-1))]
    if tau != 1.0:
        q = (shifted / tau).exp()
        sums.append(q.sum(-1, keepdim=True))
    if t is not None:
        shifted_t = (t - highest_t) if spec.teacher_temperature == 1.0 else (t - highest_t) / spec.teacher_temperature
        p = shifted_t.exp()
        # Neither is above 0, so the sum is 0 exactly where both models have their most likely token.
        agree = ((shifted + shifted_t).amax(-1, keepdim=True) == 0).to(spec.dtype)
        sums += [p.sum(-1, keepdim=True), agree]
    sums = list(across.sum(torch.cat(sums, -1)).split(1, -1))
    total1, at_target = sums[0], sums[1]
    log_total1 = total1.log()
    q1 = q1 / total1
    log_q1_target = at_target - highest - log_total1
    if tau == 1.0:
        log_q, q = shifted - log_total1, q1
    else:
        log_q, q = shifted / tau - sums[2].log(), q / sums[2]
    zero = torch.zeros_like(log_q1_target)
    value, mass, overlap, agreement, entropy_t = zero, zero, zero, zero, zero

    # The divergence's part of the gradient is q · per_row + dense + what is scattered to the columns.
    per_row: Tensor | None = None
    dense: Tensor | None = None
    columns: Tensor | None = None
    scattered: Tensor | None = None

    log_p: Tensor | None = None
    log_p_k: Tensor | None = None
    if t is not None:
        agreement = (sums[-1] > 0).to(spec.dtype)
        log_p, p = shifted_t - sums[-2].log(), p / sums[-2]

    said = rows.log_probs
    if spec.sampled and (log_p is not None or said is not None):
        teacher_said = said if log_p is None else across.pick(log_p, rows.target.unsqueeze(-1))
        student_said = log_q1_target if tau == 1.0 else across.pick(log_q, rows.target.unsqueeze(-1))
        value, slope = spec.terms(teacher_said, student_said)
        per_row, columns, scattered = -slope, rows.target.unsqueeze(-1), slope
        entropy_q = -across.sum((q * log_q).sum(-1, keepdim=True))
    elif log_p is None and rows.indices is None:
        entropy_q = -across.sum((q * log_q).sum(-1, keepdim=True))
    else:
        s_k = None
        if rows.indices is not None and said is not None:
            columns, log_p_k = rows.indices, said
            ((best, _),) = across.topk(columns.shape[-1], s)
            s_k = across.pick(s, columns)
            agreement = (s_k.gather(-1, said.argmax(-1, keepdim=True)) >= highest).to(spec.dtype)
        elif spec.topk and t is not None:
            (t_k, columns), (best, _) = across.topk(spec.topk, t, s)
            log_p_k = (t_k - highest_t) / spec.teacher_temperature - sums[-2].log()
            s_k = across.pick(s, columns)
        if s_k is not None and log_p_k is not None:
            mass = log_p_k.exp().sum(-1, keepdim=True)
            overlap = (s_k >= best.amin(-1, keepdim=True)).to(spec.dtype).mean(-1, keepdim=True)
        if columns is not None and log_p_k is not None and spec.tail in ("uniform", "zero"):
            log_p, p = _filled(log_p_k, columns, log_q, spec.tail, across)
            columns = None
        if columns is None or log_p_k is None or s_k is None:
            assert log_p is not None
            value, dense = evaluate(spec.terms, p, q, log_p, log_q, across)
            parts = torch.stack([value.sum(-1), dense.sum(-1), (q * log_q).sum(-1), (p * log_p).sum(-1)], -1)
            value, total, entropy_q, entropy_t = across.sum(parts).split(1, -1)
            entropy_q, entropy_t, per_row = -entropy_q, -entropy_t, -total
        else:
            log_q_k = (s_k - highest) / tau - (log_total1 if tau == 1.0 else sums[2].log())
            value, entropy_q, entropy_t, per_row, scattered = _sparse(
                log_p_k, log_q_k, p if log_p is not None else None, q, columns, spec, across
            )

    stats = torch.cat([value, -log_q1_target, entropy_q, entropy_t, agreement, mass, overlap], -1)
    stats = (stats * rows.weight).sum(0)
    if not spec.wants_grad:
        return stats, None

    k = rows.factor * rows.weight * spec.scale
    hard = (1 - w) * k
    c = w * (tau if spec.squared else 1 / tau) * k
    if per_row is None:
        gradient = q1 * hard
    elif tau == 1.0:
        gradient = q1 * (hard + per_row * c)
    else:
        gradient = q1 * hard + q * (per_row * c)
    if dense is not None:
        gradient = gradient + dense * c
    if scattered is not None and columns is not None:
        across.scatter_add_(gradient, columns, scattered * c)
    if w < 1:
        across.scatter_add_(gradient, rows.target.unsqueeze(-1), -hard)
    if spec.softcap is not None:
        gradient = gradient * (1 - (s / spec.softcap) ** 2)
    rows.z.copy_(gradient)
    return stats, None if rows.bias is None else gradient.sum(0)


def _logits(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None, dtype: torch.dtype) -> Tensor:
    z = z.to(dtype)
    if bias is not None:
        z = z + bias
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _filled(log_p_k: Tensor, columns: Tensor, like: Tensor, tail: str, across: Across) -> tuple[Tensor, Tensor]:
    """log p and p on every column from the k that are known."""
    known = across.scatter_add_(torch.zeros_like(like), columns, torch.ones_like(log_p_k)) > 0
    outside = across.width(like) - columns.shape[-1]
    if tail == "zero":
        log_p_k = log_p_k.log_softmax(-1)
        fill = torch.full_like(log_p_k[:, :1], ZERO_TAIL)
    else:
        left = (-torch.expm1(log_p_k.logsumexp(-1, keepdim=True))).clamp_min(0)
        fill = torch.where(left > 0, left.log() - math.log(max(outside, 1)), LOWEST)
    log_p = torch.where(known, across.scatter_add_(torch.zeros_like(like), columns, log_p_k), fill)
    return log_p, log_p.exp()


def _sparse(
    log_p: Tensor, log_q: Tensor, p_all: Tensor | None, q_all: Tensor, columns: Tensor, spec: Spec, across: Across
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Value, both entropies, and the gradient as q · per_row plus what goes to the columns, on k known columns."""
    if spec.tail == "renormalize":
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    elif spec.tail == "bucket":
        known = across.scatter_add_(torch.zeros_like(q_all), columns, torch.ones_like(log_q)) > 0
        rests = [x.masked_fill(known, 0).sum(-1, keepdim=True) for x in (q_all, p_all) if x is not None]
        rest_q, *given = across.sum(torch.cat(rests, -1)).split(1, -1)
        rest_p = given[0] if given else -torch.expm1(log_p.logsumexp(-1, keepdim=True))
        tiny = torch.finfo(q_all.dtype).tiny
        rest_q, rest_p = rest_q.clamp_min(tiny), rest_p.clamp_min(tiny)
        log_p, log_q = torch.cat([log_p, rest_p.log()], -1), torch.cat([log_q, rest_q.log()], -1)
    p, q = log_p.exp(), log_q.exp()
    value, weight = evaluate(spec.terms, p, q, log_p, log_q)
    total = weight.sum(-1, keepdim=True)
    entropies = -(q * log_q).sum(-1, keepdim=True), -(p * log_p).sum(-1, keepdim=True)
    value = value.sum(-1, keepdim=True)
    if spec.tail == "renormalize":
        return value, *entropies, None, weight - q * total
    if spec.tail == "bucket":
        # every token of the bucket has ∂D/∂q of the bucket
        slope = weight[..., -1:] / rest_q
        return value, *entropies, slope - total, weight[..., :-1] - q[..., :-1] * slope
    return value, *entropies, -total, weight
