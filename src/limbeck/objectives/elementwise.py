"""The elementwise pass of the loss: softmax statistics, divergence, diagnostics, and the gradient written over the logits.

One function of tensors serves every divergence, head and signal. It runs plain or compiled. With a ``VocabReducer`` it runs on
the vocabulary slice of one rank.

Shapes: n rows of a tile, V columns of the vocabulary (or of this rank's slice), k columns of a sparse signal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.objectives.divergences import EXCLUDED, LOWEST, evaluate
from limbeck.objectives.objective import Objective
from limbeck.objectives.output_head import LogitTransform
from limbeck.objectives.policy_gradient import policy_gradient
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabReducer

STATS = ("kd", "ce", "student_entropy", "teacher_entropy", "top1_agreement", "topk_mass", "topk_overlap", "policy")
ZERO_TAIL = -100.0  # NeMo-RL's log-probability of tokens outside the teacher's top-k


@dataclass(frozen=True)
class ElementwiseSpec:
    """The configuration of an elementwise pass: everything that is not a tensor.

    objective: its ``topk`` is 0 if that covers the vocabulary. student, teacher: the elementwise parts of both heads. dtype:
    the precision of the pass. retempered: the temperature to which a sparse signal has been brought, divided by its own.
    rollout_temperature, clip: of ``RolloutTokens``; None without.
    """

    objective: Objective
    student: LogitTransform
    teacher: LogitTransform
    wants_grad: bool
    dtype: torch.dtype
    retempered: float = 1.0
    rollout_temperature: float | None = None
    clip: tuple[float, float] | None = None


class TileInputs(NamedTuple):
    """The tensors of one tile.

    z: [n, V], the student's products h Wᵀ; overwritten with their gradient. bias: [V] or None.
    teacher, teacher_bias: [n, V] and [V], the same for the teacher, or None.
    log_probs, indices: [n, k], a sparse signal, or None. log_probs [n, 1] without indices: those of the labels.
    target: [n], the labels. weight: [n, 1], the weights of the rows. factor: 0-dim, multiplies the gradient.
    written, advantages: [n, 1], of ``RolloutTokens``, or None; there is a policy gradient if ``written`` is given.
    student_log_probs: [n, 1], overwritten with log q of the labels at the rollout's temperature, or None.
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
    written: Tensor | None = None
    advantages: Tensor | None = None
    student_log_probs: Tensor | None = None


Pass = Callable[..., "tuple[Tensor, Tensor | None]"]


@lru_cache(maxsize=32)
def elementwise_pass(spec: ElementwiseSpec, reducer: VocabReducer = NO_SHARDING, compiled: bool = False) -> Pass:
    """Return the function (*TileInputs) → (stats [len(STATS)], gradient of the bias [V] or None) for ``spec``."""

    def run(*tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _process_tile(TileInputs(*tensors), spec, reducer)  # type: ignore[arg-type]

    return torch.compile(run) if compiled else run


class SoftmaxStats(NamedTuple):
    """Softmax statistics of both models.

    highest, log_total: [n, 1], the student's largest logit and log Σ exp((z − highest) / τ_s). q1, q: [n, V], the student's
    distribution without and with τ_s. log_q1_target: [n, 1], at the labels. highest_t, log_total_t: the teacher's, with τ_t.
    p, log_p, agreement: None unless the teacher is known on every column.
    """

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
    """Value and diagnostics of the divergence, [n, 1] each, and its gradient for the student's logits.

    The gradient is q · per_row + dense, with ``scattered`` [n, k] added at ``columns`` [n, k]. per_row: [n, 1]. dense: [n, V].
    """

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


def _process_tile(tile: TileInputs, spec: ElementwiseSpec, reducer: VocabReducer) -> tuple[Tensor, Tensor | None]:
    objective = spec.objective
    s = spec.student(tile.z, tile.bias, spec.dtype)
    t = None if tile.teacher is None else spec.teacher(tile.teacher, tile.teacher_bias, spec.dtype)
    softmax = _softmax_stats(s, t, tile, spec, reducer)
    log_p = _teacher_log_prob(softmax, tile, reducer) if objective.sampled else None
    if log_p is not None:
        result = _sampled_divergence(softmax, log_p, tile, spec, reducer)
    elif objective.sampled:
        result = _dense_divergence(softmax, spec, reducer)
    elif tile.indices is not None or (objective.topk and t is not None):
        result = _topk_divergence(s, t, softmax, tile, spec, reducer)
    else:
        result = _dense_divergence(softmax, spec, reducer)
    policy, q_w, slope = torch.zeros_like(softmax.log_q1_target), None, None
    if spec.rollout_temperature is not None:
        q_w, log_q = _at_temperature(spec.rollout_temperature, s, softmax, tile, spec, reducer)
        if tile.student_log_probs is not None:
            tile.student_log_probs.copy_(log_q)
        if tile.written is not None:
            advantages = torch.zeros_like(log_q) if tile.advantages is None else tile.advantages
            if objective.policy_gradient and log_p is not None:
                advantages = advantages + objective.kd_weight * (log_p - tile.written)
            policy, slope = policy_gradient(log_q, tile.written, advantages, spec.clip)
    stats = [result.value, -softmax.log_q1_target, *result[1:6], policy]
    stats_sum = (torch.cat(stats, -1) * tile.weight).sum(0)
    if not spec.wants_grad:
        return stats_sum, None

    w, tau = objective.kd_weight, objective.temperature
    k = tile.factor * tile.weight * spec.student.scale
    ce_scale, kd_scale = (1 - w) * k, w * (tau if objective.squared else 1 / tau) * k
    if w == 0 or objective.policy_gradient:  # there may be a teacher for the diagnostics only
        result = result._replace(per_row=None, dense=None, columns=None)
    if result.per_row is None:
        gradient = softmax.q1 * ce_scale
    elif tau == 1.0:
        gradient = softmax.q1 * (ce_scale + result.per_row * kd_scale)
    else:
        gradient = softmax.q1 * ce_scale + softmax.q * (result.per_row * kd_scale)
    if result.dense is not None:
        gradient = gradient + result.dense * kd_scale
    if result.columns is not None and result.scattered is not None:
        reducer.scatter_add_(gradient, result.columns, result.scattered * kd_scale)
    if w < 1:
        reducer.scatter_add_(gradient, tile.target.unsqueeze(-1), -ce_scale)
    if q_w is not None and slope is not None and spec.rollout_temperature is not None:
        policy_scale = k * slope / spec.rollout_temperature
        gradient = gradient - q_w * policy_scale
        reducer.scatter_add_(gradient, tile.target.unsqueeze(-1), policy_scale)
    if spec.student.softcap is not None:
        gradient = gradient * (1 - (s / spec.student.softcap) ** 2)
    tile.z.copy_(gradient)
    return stats_sum, None if tile.bias is None else gradient.sum(0)


def _softmax_stats(
    s: Tensor, t: Tensor | None, tile: TileInputs, spec: ElementwiseSpec, reducer: VocabReducer
) -> SoftmaxStats:
    """Two reductions over the vocabulary give all statistics: the maxima, then the sums of exponentials."""
    tau, tau_t = spec.objective.temperature, spec.objective.teacher_temperature
    highest, highest_t = s.amax(-1, keepdim=True), None
    if t is None:
        highest = reducer.max(highest)
    else:
        highest, highest_t = reducer.max(torch.cat([highest, t.amax(-1, keepdim=True)], -1)).split(1, -1)
    shifted = s - highest
    tempered = shifted if tau == 1.0 else shifted / tau
    exp1 = shifted.exp()
    exp = exp1 if tau == 1.0 else tempered.exp()
    sums = [
        reducer.gather_local(s, tile.target.unsqueeze(-1)),
        exp1.sum(-1, keepdim=True),
        exp.sum(-1, keepdim=True),
    ]
    if t is None or highest_t is None:
        at_target, total1, total = reducer.sum(torch.cat(sums, -1)).split(1, -1)
        return _student_stats(highest, exp1 / total1, at_target - highest - total1.log(), tempered, exp, total, tau)
    shifted_t = t - highest_t
    tempered_t = shifted_t if tau_t == 1.0 else shifted_t / tau_t
    exp_t = tempered_t.exp()
    # Both terms are at most 0, so the sum is 0 exactly at a column that is the most likely one of both models.
    agree = ((shifted + shifted_t).amax(-1, keepdim=True) == 0).to(spec.dtype)
    sums += [exp_t.sum(-1, keepdim=True), agree]
    at_target, total1, total, total_t, agree = reducer.sum(torch.cat(sums, -1)).split(1, -1)
    stats = _student_stats(highest, exp1 / total1, at_target - highest - total1.log(), tempered, exp, total, tau)
    return stats._replace(
        highest_t=highest_t,
        log_total_t=total_t.log(),
        p=exp_t / total_t,
        log_p=tempered_t - total_t.log(),
        agreement=(agree > 0).to(spec.dtype),
    )


def _student_stats(
    highest: Tensor, q1: Tensor, log_q1_target: Tensor, tempered: Tensor, exp: Tensor, total: Tensor, tau: float
) -> SoftmaxStats:
    q = q1 if tau == 1.0 else exp / total
    return SoftmaxStats(highest, total.log(), q1, q, tempered - total.log(), log_q1_target)


def _dense_divergence(softmax: SoftmaxStats, spec: ElementwiseSpec, reducer: VocabReducer) -> DivergenceGrad:
    """The divergence over the whole vocabulary. Without a teacher only the student's entropy."""
    zero = torch.zeros_like(softmax.log_q1_target)
    if softmax.p is None or softmax.log_p is None:
        return DivergenceGrad(zero, _student_entropy(softmax, reducer), zero, zero, zero, zero)
    value, dense = evaluate(spec.objective.divergence_fn, softmax.p, softmax.q, softmax.log_p, softmax.log_q, reducer)
    parts = torch.stack(
        [value.sum(-1), dense.sum(-1), (softmax.q * softmax.log_q).sum(-1), (softmax.p * softmax.log_p).sum(-1)], -1
    )
    value, total, minus_q, minus_p = reducer.sum(parts).split(1, -1)
    agreement = zero if softmax.agreement is None else softmax.agreement
    return DivergenceGrad(value, -minus_q, -minus_p, agreement, zero, zero, -total, dense)


def _teacher_log_prob(softmax: SoftmaxStats, tile: TileInputs, reducer: VocabReducer) -> Tensor | None:
    """The teacher's log-probability of the labels, [n, 1]; None without a teacher."""
    return tile.log_probs if softmax.log_p is None else reducer.gather(softmax.log_p, tile.target.unsqueeze(-1))


def _at_temperature(
    tau: float, s: Tensor, softmax: SoftmaxStats, tile: TileInputs, spec: ElementwiseSpec, reducer: VocabReducer
) -> tuple[Tensor, Tensor]:
    """The student's distribution [n, V] at the temperature ``tau``, and its log-probabilities of the labels [n, 1]."""
    columns = tile.target.unsqueeze(-1)
    if tau == 1.0:
        return softmax.q1, softmax.log_q1_target
    if tau == spec.objective.temperature:
        return softmax.q, reducer.gather(softmax.log_q, columns)
    tempered = (s - softmax.highest) / tau
    exp = tempered.exp()
    sums = torch.cat([reducer.gather_local(tempered, columns), exp.sum(-1, keepdim=True)], -1)
    at_target, total = reducer.sum(sums).split(1, -1)
    return exp / total, at_target - total.log()


def _sampled_divergence(
    softmax: SoftmaxStats, log_p: Tensor, tile: TileInputs, spec: ElementwiseSpec, reducer: VocabReducer
) -> DivergenceGrad:
    """An estimator of the divergence from the sampled token, of which the teacher's log-probability is log_p [n, 1].

    The teacher's entropy and the agreement are NaN if only log_p is known.
    """
    zero, columns = torch.zeros_like(softmax.log_q1_target), tile.target.unsqueeze(-1)
    log_q = softmax.log_q1_target if spec.objective.temperature == 1.0 else reducer.gather(softmax.log_q, columns)
    value, slope = spec.objective.divergence_fn(log_p, log_q)
    entropy_q = _student_entropy(softmax, reducer)
    entropy_p = agreement = torch.full_like(zero, torch.nan)
    if softmax.p is not None and softmax.log_p is not None and softmax.agreement is not None:
        entropy_p, agreement = -reducer.sum((softmax.p * softmax.log_p).sum(-1, keepdim=True)), softmax.agreement
    return DivergenceGrad(value, entropy_q, entropy_p, agreement, zero, zero, -slope, None, columns, slope)


def _topk_divergence(
    s: Tensor, t: Tensor | None, softmax: SoftmaxStats, tile: TileInputs, spec: ElementwiseSpec, reducer: VocabReducer
) -> DivergenceGrad:
    """The divergence over the k most likely tokens of one model and a tail. The k come from a signal or from the logits."""
    objective = spec.objective
    if tile.indices is not None and tile.log_probs is not None:
        columns, log_p = tile.indices, tile.log_probs
        used = log_p > EXCLUDED
        ((best, _),) = reducer.topk(columns.shape[-1], s)
    else:
        assert t is not None and softmax.highest_t is not None and softmax.log_total_t is not None
        (t_k, columns), (best, of_student) = reducer.topk(objective.topk, t, s)
        if objective.topk_from == "student":
            best, columns = t_k, of_student  # of the other model, for the overlap
            t_k = reducer.gather(t, columns)
        used = t_k > EXCLUDED
        log_p = (t_k - softmax.highest_t) / objective.teacher_temperature - softmax.log_total_t
    log_p = log_p.masked_fill(~used, LOWEST)
    sent = reducer.scatter_add_(torch.zeros_like(softmax.q), columns, used.to(spec.dtype)) > 0
    outside = reducer.width(s) - used.sum(-1, keepdim=True)
    # One reduction for the student's logits at the columns and both models' mass outside of them.
    parts = [reducer.gather_local(s, columns)]
    if objective.tail == "bucket":
        parts.append(softmax.q.masked_fill(sent, 0).sum(-1, keepdim=True))
    if objective.tail in ("bucket", "uniform") and softmax.p is not None:
        parts.append(softmax.p.masked_fill(sent, 0).sum(-1, keepdim=True))
    s_k, *rests = reducer.sum(torch.cat(parts, -1)).split([x.shape[-1] for x in parts], -1)
    if softmax.agreement is not None:
        agreement = softmax.agreement
    else:
        agreement = (s_k.gather(-1, log_p.argmax(-1, keepdim=True)) >= softmax.highest).to(spec.dtype)

    if objective.tail in ("uniform", "zero"):
        rest_p = None if objective.tail == "zero" else _teacher_rest(log_p, outside, rests[-1] if rests else None)
        log_p_all = _fill_tail(log_p, used, columns, sent, rest_p, outside, reducer)
        result = _dense_divergence(softmax._replace(p=log_p_all.exp(), log_p=log_p_all), spec, reducer)
    else:
        log_q = (s_k - softmax.highest) / objective.temperature - softmax.log_total
        log_q = log_q.masked_fill(~used, LOWEST)
        if objective.tail == "bucket":
            rest_q = rests[0].clamp_min(torch.finfo(spec.dtype).tiny)
            rest_p = _teacher_rest(log_p, outside, rests[1] if len(rests) > 1 else None)
            result = _bucket_divergence(log_p, log_q, rest_p, rest_q, softmax.q.masked_fill(sent, 0), columns, spec)
        else:
            result = _sparse_divergence(log_p, log_q, columns, spec)
    mass = (log_p * spec.retempered).exp().sum(-1, keepdim=True)  # known at the signal's own temperature only
    compared = t_k if objective.topk_from == "student" else s_k
    overlap = ((compared >= best.amin(-1, keepdim=True)) & used).to(spec.dtype).mean(-1, keepdim=True)
    return result._replace(agreement=agreement, mass=mass, overlap=overlap)


def _student_entropy(softmax: SoftmaxStats, reducer: VocabReducer) -> Tensor:
    return -reducer.sum((softmax.q * softmax.log_q).sum(-1, keepdim=True))


def _teacher_rest(log_p: Tensor, outside: Tensor, rest: Tensor | None) -> Tensor:
    """The teacher's mass [n, 1] on the ``outside`` tokens, above 0 so that its logarithm is finite.

    It is ``rest`` if every column is known. From the k alone it is 1 − P, of which rounding leaves nothing below eps: less than
    eps counts as eps, unless the k are the whole vocabulary.
    """
    tiny = torch.finfo(log_p.dtype).tiny
    if rest is not None:
        return rest.clamp_min(tiny)
    least = torch.full_like(log_p[:, :1], tiny).masked_fill(outside > 0, torch.finfo(log_p.dtype).eps)
    return torch.maximum(-torch.expm1(log_p.logsumexp(-1, keepdim=True)), least)


def _fill_tail(
    log_p: Tensor,
    used: Tensor,
    columns: Tensor,
    sent: Tensor,
    rest_p: Tensor | None,
    outside: Tensor,
    reducer: VocabReducer,
) -> Tensor:
    """log p [n, V] from its k entries: ``rest_p`` [n, 1] is spread over the rest, or the rest has ``ZERO_TAIL`` if None."""
    if rest_p is None:
        log_p = log_p.log_softmax(-1)
        fill = torch.full_like(log_p[:, :1], ZERO_TAIL)
    else:
        fill = rest_p.log() - outside.clamp_min(1).double().log().to(log_p.dtype)
    zeros = torch.zeros(sent.shape, dtype=log_p.dtype, device=log_p.device)
    return torch.where(sent, reducer.scatter_add_(zeros, columns, log_p.masked_fill(~used, 0)), fill)


def _sparse_divergence(log_p: Tensor, log_q: Tensor, columns: Tensor, spec: ElementwiseSpec) -> DivergenceGrad:
    """The divergence on k columns only: the tails ``renormalize`` and ``drop``."""
    renormalize = spec.objective.tail == "renormalize"
    if renormalize:
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    value, weight, entropies = _evaluate_columns(log_p, log_q, spec)
    total = weight.sum(-1, keepdim=True)
    per_row, scattered = (None, weight - log_q.exp() * total) if renormalize else (-total, weight)
    none = torch.zeros_like(value)
    return DivergenceGrad(value, *entropies, none, none, none, per_row, None, columns, scattered)


def _bucket_divergence(
    log_p: Tensor, log_q: Tensor, rest_p: Tensor, rest_q: Tensor, q_rest: Tensor, columns: Tensor, spec: ElementwiseSpec
) -> DivergenceGrad:
    """The divergence on k columns and one further token of the masses rest_p and rest_q [n, 1], the tail ``bucket``.

    q_rest: [n, V], q with zeros at the k columns.
    """
    log_p, log_q = torch.cat([log_p, rest_p.log()], -1), torch.cat([log_q, rest_q.log()], -1)
    value, weight, entropies = _evaluate_columns(log_p, log_q, spec)
    # Each token of the bucket has the bucket's ∂D/∂q, which is unbounded: form the token's share of the bucket first.
    dense, scattered = q_rest / rest_q * weight[..., -1:], weight[..., :-1]
    none = torch.zeros_like(value)
    return DivergenceGrad(value, *entropies, none, none, none, -weight.sum(-1, keepdim=True), dense, columns, scattered)


def _evaluate_columns(
    log_p: Tensor, log_q: Tensor, spec: ElementwiseSpec
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Value [n, 1], gradient weight [n, k], and both entropies [n, 1] (student, teacher) on k columns."""
    p, q = log_p.exp(), log_q.exp()
    value, weight = evaluate(spec.objective.divergence_fn, p, q, log_p, log_q)
    value, minus_q, minus_p = (x.sum(-1, keepdim=True) for x in (value, q * log_q, p * log_p))
    return value, weight, (-minus_q, -minus_p)
