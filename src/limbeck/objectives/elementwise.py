"""What happens to a tile of logits: both log-sum-exps, value, diagnostics, and the gradient written over the student's logits.

One function of tensors for every divergence, head and signal. It runs as it stands or compiled, and on a slice of the
vocabulary when ``VocabReducer`` sums over the ranks that hold the others.

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

from limbeck.objectives.divergences import LOWEST, DivergenceFn, evaluate
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabReducer

STATS = ("kd", "ce", "student_entropy", "teacher_entropy", "top1_agreement", "topk_mass", "topk_overlap")
ZERO_TAIL = -100.0  # NeMo-RL's log-probability of what the teacher left out


@dataclass(frozen=True)
class Spec:
    """Everything about the pass that is not a tensor; see ``Objective`` and ``OutputHead`` for the fields' meaning."""

    terms: DivergenceFn
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
    retempered: float = 1.0
    """The temperature that a sparse signal has been brought to, divided by its own."""


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
def elementwise_pass(spec: Spec, across: VocabReducer = NO_SHARDING, compiled: bool = False) -> Pass:
    """The function (*Rows) → (stats [len(STATS)], gradient of the bias [V] or None) for ``spec``."""

    def run(*tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _run(Rows(*tensors), spec, across)  # type: ignore[arg-type]

    return torch.compile(run) if compiled else run


class SoftmaxStats(NamedTuple):
    """Both models at n rows. highest, log_total [n, 1]: of the student's logits, and of these ÷ τ_s less ``highest``; the same
    for the teacher with τ_t. q1, q [n, V]: the student's distribution without and with τ_s. p, log_p: None unless the teacher
    is known on every column."""

    highest: Tensor
    log_total: Tensor
    q1: Tensor
    q: Tensor
    log_q: Tensor
    log_q1_target: Tensor
    highest_t: Tensor | None = None
    log_total_t: Tensor | None = None
    p: Tensor | None = None
    log_p: Tensor | None = None
    agreement: Tensor | None = None


class DivergenceGrad(NamedTuple):
    """What the divergence gives: [n, 1] each, and its gradient as q · per_row + dense [n, V] + scattered [n, k] to columns."""

    value: Tensor
    entropy_q: Tensor
    entropy_p: Tensor
    agreement: Tensor
    mass: Tensor
    overlap: Tensor
    per_row: Tensor | None = None
    dense: Tensor | None = None
    columns: Tensor | None = None
    scattered: Tensor | None = None


def _run(rows: Rows, spec: Spec, across: VocabReducer) -> tuple[Tensor, Tensor | None]:
    s = _logits(rows.z, rows.bias, spec.scale, spec.softcap, spec.dtype)
    t = None
    if rows.teacher is not None:
        t = _logits(rows.teacher, rows.teacher_bias, spec.teacher_scale, spec.teacher_softcap, spec.dtype)
    seen = _normalised(s, t, rows, spec, across)
    if spec.sampled:
        found = _of_the_drawn(seen, rows, spec, across)
    elif rows.indices is not None or (spec.topk and t is not None):
        found = _of_the_likeliest(s, t, seen, rows, spec, across)
    else:
        found = _of_all(seen, spec, across)
    stats = [found.value, -seen.log_q1_target, *found[1:6]]
    stats_sum = (torch.cat(stats, -1) * rows.weight).sum(0)
    if not spec.wants_grad:
        return stats_sum, None

    w, tau = spec.kd_weight, spec.temperature
    k = rows.factor * rows.weight * spec.scale
    hard, c = (1 - w) * k, w * (tau if spec.squared else 1 / tau) * k
    if w == 0:  # a teacher may be there for the diagnostics alone
        found = found._replace(per_row=None, dense=None, columns=None)
    if found.per_row is None:
        gradient = seen.q1 * hard
    elif tau == 1.0:
        gradient = seen.q1 * (hard + found.per_row * c)
    else:
        gradient = seen.q1 * hard + seen.q * (found.per_row * c)
    if found.dense is not None:
        gradient = gradient + found.dense * c
    if found.columns is not None and found.scattered is not None:
        across.scatter_add_(gradient, found.columns, found.scattered * c)
    if w < 1:
        across.scatter_add_(gradient, rows.target.unsqueeze(-1), -hard)
    if spec.softcap is not None:
        gradient = gradient * (1 - (s / spec.softcap) ** 2)
    rows.z.copy_(gradient)
    return stats_sum, None if rows.bias is None else gradient.sum(0)


def _normalised(s: Tensor, t: Tensor | None, rows: Rows, spec: Spec, across: VocabReducer) -> SoftmaxStats:
    """Two reductions give every normaliser: the maxima, then the sums of exponentials."""
    tau, tau_t = spec.temperature, spec.teacher_temperature
    highest, highest_t = s.amax(-1, keepdim=True), None
    if t is None:
        highest = across.max(highest)
    else:
        highest, highest_t = across.max(torch.cat([highest, t.amax(-1, keepdim=True)], -1)).split(1, -1)
    shifted = s - highest
    tempered = shifted if tau == 1.0 else shifted / tau
    exp1 = shifted.exp()
    exp = exp1 if tau == 1.0 else tempered.exp()
    sums = [across.share(s, rows.target.unsqueeze(-1)), exp1.sum(-1, keepdim=True), exp.sum(-1, keepdim=True)]
    if t is None or highest_t is None:
        at_target, total1, total = across.sum(torch.cat(sums, -1)).split(1, -1)
        return _seen(highest, exp1 / total1, at_target - highest - total1.log(), tempered, exp, total, tau)
    shifted_t = t - highest_t
    tempered_t = shifted_t if tau_t == 1.0 else shifted_t / tau_t
    exp_t = tempered_t.exp()
    # Neither is above 0, so the sum is 0 exactly where both models have their most likely token.
    agree = ((shifted + shifted_t).amax(-1, keepdim=True) == 0).to(spec.dtype)
    sums += [exp_t.sum(-1, keepdim=True), agree]
    at_target, total1, total, total_t, agree = across.sum(torch.cat(sums, -1)).split(1, -1)
    seen = _seen(highest, exp1 / total1, at_target - highest - total1.log(), tempered, exp, total, tau)
    return seen._replace(
        highest_t=highest_t,
        log_total_t=total_t.log(),
        p=exp_t / total_t,
        log_p=tempered_t - total_t.log(),
        agreement=(agree > 0).to(spec.dtype),
    )


def _seen(
    highest: Tensor, q1: Tensor, log_q1_target: Tensor, tempered: Tensor, exp: Tensor, total: Tensor, tau: float
) -> SoftmaxStats:
    q = q1 if tau == 1.0 else exp / total
    return SoftmaxStats(highest, total.log(), q1, q, tempered - total.log(), log_q1_target)


def _of_all(seen: SoftmaxStats, spec: Spec, across: VocabReducer) -> DivergenceGrad:
    """The divergence over the whole vocabulary; without a teacher nothing but the student's entropy."""
    zero = torch.zeros_like(seen.log_q1_target)
    if seen.p is None or seen.log_p is None:
        return DivergenceGrad(zero, _entropy(seen, across), zero, zero, zero, zero)
    value, dense = evaluate(spec.terms, seen.p, seen.q, seen.log_p, seen.log_q, across)
    parts = torch.stack(
        [value.sum(-1), dense.sum(-1), (seen.q * seen.log_q).sum(-1), (seen.p * seen.log_p).sum(-1)], -1
    )
    value, total, minus_q, minus_p = across.sum(parts).split(1, -1)
    agreement = zero if seen.agreement is None else seen.agreement
    return DivergenceGrad(value, -minus_q, -minus_p, agreement, zero, zero, -total, dense)


def _of_the_drawn(seen: SoftmaxStats, rows: Rows, spec: Spec, across: VocabReducer) -> DivergenceGrad:
    """An estimator of the divergence from the label alone."""
    zero, columns = torch.zeros_like(seen.log_q1_target), rows.target.unsqueeze(-1)
    log_p = rows.log_probs if seen.log_p is None else across.pick(seen.log_p, columns)
    if log_p is None:
        return _of_all(seen, spec, across)
    log_q = seen.log_q1_target if spec.temperature == 1.0 else across.pick(seen.log_q, columns)
    value, slope = spec.terms(log_p, log_q)
    agreement = zero if seen.agreement is None else seen.agreement
    return DivergenceGrad(value, _entropy(seen, across), zero, agreement, zero, zero, -slope, None, columns, slope)


def _of_the_likeliest(
    s: Tensor, t: Tensor | None, seen: SoftmaxStats, rows: Rows, spec: Spec, across: VocabReducer
) -> DivergenceGrad:
    """The divergence over the teacher's k most likely tokens, which it has sent or which its logits show, and their tail."""
    if rows.indices is not None and rows.log_probs is not None:
        columns, log_p = rows.indices, rows.log_probs
        ((best, _),) = across.topk(columns.shape[-1], s)
        s_k = across.pick(s, columns)
        agreement = (s_k.gather(-1, log_p.argmax(-1, keepdim=True)) >= seen.highest).to(spec.dtype)
    else:
        assert t is not None and seen.highest_t is not None and seen.log_total_t is not None
        (t_k, columns), (best, _) = across.topk(spec.topk, t, s)
        log_p = (t_k - seen.highest_t) / spec.teacher_temperature - seen.log_total_t
        s_k = across.pick(s, columns)
        agreement = torch.zeros_like(seen.highest) if seen.agreement is None else seen.agreement
    mass = (log_p * spec.retempered).exp().sum(-1, keepdim=True)  # known at the signal's own temperature alone
    overlap = (s_k >= best.amin(-1, keepdim=True)).to(spec.dtype).mean(-1, keepdim=True)
    if spec.tail in ("uniform", "zero"):
        log_p, p = _filled(log_p, columns, seen.log_q, spec.tail, across)
        found = _of_all(seen._replace(p=p, log_p=log_p), spec, across)
    else:
        log_q = (s_k - seen.highest) / spec.temperature - seen.log_total
        found = _sparse(log_p, log_q, seen.p, seen.q, columns, spec, across)
    return found._replace(agreement=agreement, mass=mass, overlap=overlap)


def _entropy(seen: SoftmaxStats, across: VocabReducer) -> Tensor:
    return -across.sum((seen.q * seen.log_q).sum(-1, keepdim=True))


def _logits(z: Tensor, bias: Tensor | None, scale: float, softcap: float | None, dtype: torch.dtype) -> Tensor:
    z = z.to(dtype)
    if bias is not None:
        z = z + bias
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _filled(log_p_k: Tensor, columns: Tensor, like: Tensor, tail: str, across: VocabReducer) -> tuple[Tensor, Tensor]:
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
    log_p: Tensor, log_q: Tensor, p_all: Tensor | None, q_all: Tensor, columns: Tensor, spec: Spec, across: VocabReducer
) -> DivergenceGrad:
    """The divergence on k known columns, with a tail that is not spread over the others."""
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
    per_row: Tensor | None = -total
    dense, scattered = None, weight
    if spec.tail == "renormalize":
        per_row, scattered = None, weight - q * total
    elif spec.tail == "bucket":
        # Every token of the bucket has ∂D/∂q of the bucket, which has no bound: its share of the bucket comes first.
        dense, scattered = q_all.masked_fill(known, 0) / rest_q * weight[..., -1:], weight[..., :-1]
    value, minus_q, minus_p = (x.sum(-1, keepdim=True) for x in (value, q * log_q, p * log_p))
    none = torch.zeros_like(value)
    return DivergenceGrad(value, -minus_q, -minus_p, none, none, none, per_row, dense, columns, scattered)
