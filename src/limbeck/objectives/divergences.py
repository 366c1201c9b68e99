"""The divergences between a teacher's distribution p and a student's distribution q.

A divergence D(p, q) is a pair of elementwise formulas: its value, and the gradient weight w = q · ∂D/∂q. With q = softmax(z/τ),
the gradient for the student's logits z is

    ∂D/∂z = (w − q · Σw) / τ

The closed form, the fused loss, the top-k, vocabulary-parallel and GPU paths all use the same pair.

Shapes: every tensor is [rows, vocab]. The value of a row is the sum over its last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.objectives.first_order import first_order_only
from limbeck.objectives.sampled import ESTIMATORS
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabReducer
from limbeck.registry import DIVERGENCES

DivergenceFn = Callable[..., "tuple[Tensor, Tensor]"]
"""(p, q, log p, log q), each [rows, vocab] → (value, w), each [rows, vocab].

If its attribute ``needs_vocab_reduction`` is set, it takes a ``VocabReducer`` as a fifth argument, for sums over the
vocabulary."""

LOWEST = -1e5
"""Replaces logits below it, −∞ in particular. Its probability is 0 in float32, and 0 · LOWEST is 0 where 0 · −∞ is NaN.

Where a divergence is infinite because one side excludes a token (see ``check_support``), the loss on a GPU is finite with this
number in place of −∞. float16's lowest finite logit, −65504, is above it."""

EXCLUDED = 0.8 * LOWEST
"""A logit, or a log-probability of a ``TopK``, that is not above this marks an excluded token."""


def register(make: Callable[..., DivergenceFn]) -> Callable[..., DivergenceFn]:
    """Register a divergence under the name of the function ``make``; usable as a decorator.

    ``make(**parameters)`` returns a ``DivergenceFn``. Raises LimbeckError if another file has registered the name.
    """
    if make.__name__ in ESTIMATORS:
        raise LimbeckError(f"{make.__name__} is the name of an estimator; register your divergence under another name.")
    return DIVERGENCES.register(make.__name__)(make)


def needs_vocab_reduction(divergence_fn: DivergenceFn) -> DivergenceFn:
    """Mark a function whose entries of a row depend on one another. It takes a ``VocabReducer`` as its fifth argument."""
    divergence_fn.needs_vocab_reduction = True  # type: ignore[attr-defined]
    return divergence_fn


def evaluate(
    divergence_fn: DivergenceFn, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, reducer: VocabReducer = NO_SHARDING
) -> tuple[Tensor, Tensor]:
    """Return value and gradient weight, each [rows, vocab], with or without ``needs_vocab_reduction``."""
    if getattr(divergence_fn, "needs_vocab_reduction", False):
        return divergence_fn(p, q, log_p, log_q, reducer)
    return divergence_fn(p, q, log_p, log_q)


def names() -> list[str]:
    """Return the names of the registered divergences, sorted."""
    return DIVERGENCES.names()


def make_divergence(name: str, **parameters: Any) -> DivergenceFn:
    """Return the ``DivergenceFn`` of the registered divergence ``name``.

    Raises LimbeckError for an unknown name, for parameters that it does not take, and for a function of another file that does
    not return two tensors [rows, vocab].
    """
    if name not in DIVERGENCES:
        raise LimbeckError(f"there is no divergence called {name!r}; the known ones are {', '.join(names())}.")
    make = DIVERGENCES.get(name)
    try:
        divergence_fn = make(**parameters)
    except TypeError as error:
        raise LimbeckError(f"the divergence {name} does not take these parameters: {error}.") from error
    if make.__module__ != __name__:
        _check_shapes(name, divergence_fn)
    return divergence_fn


def _check_shapes(name: str, divergence_fn: Any) -> None:
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6], [0.25, 0.25, 0.25, 0.25]])
    q = p.flip(-1)
    try:
        value, weight = evaluate(divergence_fn, p, q, p.log(), q.log())
        shapes = [tuple(value.shape), tuple(weight.shape)]
    except Exception as error:
        raise LimbeckError(
            f"the divergence {name} fails ({type(error).__name__}: {error}); it must return a function of p, q, log_p and "
            "log_q, each [rows, vocab], that gives (value, w), each [rows, vocab]."
        ) from error
    if shapes != [(3, 4), (3, 4)]:
        raise LimbeckError(
            f"the divergence {name} gives {shapes[0]} and {shapes[1]} for [3, 4]; value and w must both be [rows, vocab]."
        )


def is_infinite_where_zero(divergence_fn: DivergenceFn, side: str) -> bool:
    """Whether D is infinite if only the ``side``, "teacher" or "student", has probability 0 for some token.

    Evaluates D for the distributions (0, 1) and (½, ½), with −1e30 for log 0.
    """
    zero, half = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    log_zero = torch.tensor([[-1e30, 0.0]])
    p, q, log_p, log_q = (zero, half, log_zero, half.log()) if side == "teacher" else (half, zero, half.log(), log_zero)
    return not bool((evaluate(divergence_fn, p, q, log_p, log_q)[0].abs() < 1e20).all())


_LEAST_EXPONENT = 0.01


def forward_kl() -> DivergenceFn:
    """KL(p ‖ q) = Σ p (log p − log q). Mode-covering (Hinton et al., 2015, arXiv 1503.02531)."""

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return p * (log_p - log_q), -p

    return terms


def reverse_kl() -> DivergenceFn:
    """KL(q ‖ p) = Σ q (log q − log p). Mode-seeking (MiniLLM, arXiv 2306.08543)."""

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        value = q * (log_q - log_p)
        return value, value + q

    return terms


def cross_entropy() -> DivergenceFn:
    """−Σ p log q: the forward KL plus the teacher's entropy, with the same gradient."""

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return -p * log_q, -p

    return terms


def mixed_kl(forward: float = 0.5) -> DivergenceFn:
    """λ KL(p ‖ q) + (1−λ) KL(q ‖ p), λ = ``forward`` (NeMo-RL's mixed KL)."""
    if not 0 <= forward <= 1:
        raise LimbeckError(f"mixed_kl needs the weight of the forward KL in [0, 1], got {forward}.")
    return _both_ways(forward, 1 - forward)


def symmetric_kl() -> DivergenceFn:
    """KL(p ‖ q) + KL(q ‖ p) (Jeffreys, 1946)."""
    return _both_ways(1.0, 1.0)


def _both_ways(forward: float, reverse: float) -> DivergenceFn:
    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        gap = log_p - log_q
        return (forward * p - reverse * q) * gap, reverse * q * (1 - gap) - forward * p

    return terms


def js_divergence(beta: float = 0.5, smoothing: float = 0.0) -> DivergenceFn:
    """Generalised Jensen-Shannon, M = βp + (1−β)q: β KL(p ‖ M) + (1−β) KL(q ‖ M) (GKD, arXiv 2306.13649).

    β = ½ is the symmetric divergence. D tends to 0 for β → 0 and β → 1; there D/β tends to the forward KL and D/(1−β) to the
    reverse KL. β = 0 and β = 1 select these two KLs, as in GKD. ``smoothing`` is added inside each logarithm (ROLL uses 1e-9).
    The gradient is that of the smoothed value.
    """
    if not (0 <= beta <= 1 and smoothing >= 0):
        raise LimbeckError(
            f"js_divergence needs beta in [0, 1] and smoothing of 0 or more, got {beta} and {smoothing}."
        )
    if beta == 0:
        return forward_kl()
    if beta == 1:
        return reverse_kl()
    if smoothing:
        return _smoothed_js(beta, smoothing)

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = torch.log(_mixture(beta, p, q))
        weight = (1 - beta) * q * (log_q - log_m)
        return weight + beta * p * (log_p - log_m), weight

    return terms


def _smoothed_js(beta: float, smoothing: float) -> DivergenceFn:
    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        m = beta * p + (1 - beta) * q
        log_m, log_own = torch.log(m + smoothing), torch.log(q + smoothing)
        value = beta * p * (torch.log(p + smoothing) - log_m) + (1 - beta) * q * (log_own - log_m)
        slope = log_own - log_m + q / (q + smoothing) - m / (m + smoothing)
        return value, (1 - beta) * q * slope

    return terms


def skewed_forward_kl(skew: float = 0.1) -> DivergenceFn:
    """KL(p ‖ m), m = λp + (1−λ)q (DistiLLM's skew KL, arXiv 2402.03898). λ = 0 is the forward KL."""
    if not 0 <= skew < 1:
        raise LimbeckError(f"skewed_forward_kl needs skew_lambda in [0, 1), got {skew}.")
    if skew == 0:
        return forward_kl()

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        m = _mixture(skew, p, q)
        return p * (log_p - torch.log(m)), -(1 - skew) * q * (p / m)

    return terms


def skewed_reverse_kl(skew: float = 0.1) -> DivergenceFn:
    """KL(q ‖ m), m = (1−λ)p + λq (DistiLLM's skew reverse KL, arXiv 2402.03898). λ = 0 is the reverse KL."""
    if not 0 <= skew < 1:
        raise LimbeckError(f"skewed_reverse_kl needs skew_lambda in [0, 1), got {skew}.")
    if skew == 0:
        return reverse_kl()

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        m = _mixture(skew, q, p)
        value = q * (log_q - torch.log(m))
        return value, value + q - skew * q * (q / m)

    return terms


def _mixture(share: float, a: Tensor, b: Tensor) -> Tensor:
    """share · a + (1 − share) · b, at least the smallest normal number, so that 0 times its logarithm is 0."""
    return (share * a + (1 - share) * b).clamp_min(torch.finfo(a.dtype).tiny)


def tvd() -> DivergenceFn:
    """Total variation ½ Σ |p − q|."""

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        gap = q - p
        return 0.5 * gap.abs(), 0.5 * q * gap.sign()

    return terms


def alpha_beta(alpha: float = 0.5, beta: float = 0.5) -> DivergenceFn:
    """−1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)] (Cichocki et al., 2011; ABKD, arXiv 2505.04560).

    (1, 0) is the forward and (0, 1) the reverse KL, as limits; (½, ½) is 4 (1 − Σ√pq), (1, 1) is ½ Σ(p − q)².
    An exponent between 0 and 0.01 is refused, because float32 loses its digits there.
    """
    if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
        raise LimbeckError(
            f"alpha_beta needs alpha and beta of 0 or more, one of them above 0; got {alpha} and {beta}."
        )
    if 0 < min(alpha, beta) < _LEAST_EXPONENT:
        raise LimbeckError(
            f"alpha_beta loses its digits with an exponent below {_LEAST_EXPONENT}, got {alpha} and {beta}; 0 is the limit."
        )
    both = alpha + beta

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p_both, q_both = torch.exp(both * log_p), torch.exp(both * log_q)
        if beta == 0:
            value = p_both * (log_p - log_q) / alpha - (p_both - q_both) / alpha**2
            return value, (q_both - p_both) / alpha
        if alpha == 0:
            gap = q_both * (log_q - log_p)
            return gap / beta - (q_both - p_both) / beta**2, gap
        cross = torch.exp(alpha * log_p + beta * log_q)
        value = -(cross - alpha / both * p_both - beta / both * q_both) / (alpha * beta)
        return value, (q_both - cross) / alpha

    return terms


def taid(t: float | Tensor = 0.4) -> DivergenceFn:
    """KL(p_t ‖ q), p_t = softmax((1−t) log q + t log p); p_t is a constant for the gradient (TAID, arXiv 2501.16937).

    t moves from 0 (the student) to 1 (the teacher); see ``TaidSchedule``. A tensor t is read when the loss is computed.
    """
    if isinstance(t, float | int) and not 0 <= t <= 1:
        raise LimbeckError(f"taid needs t in [0, 1], got {t}.")

    @needs_vocab_reduction
    def terms(
        p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, reducer: VocabReducer = NO_SHARDING
    ) -> tuple[Tensor, Tensor]:
        mixed = log_q + t * (log_p - log_q)
        highest = reducer.max(mixed.amax(-1, keepdim=True))
        log_m = mixed - highest - reducer.sum(torch.exp(mixed - highest).sum(-1, keepdim=True)).log()
        m = torch.exp(log_m)
        return m * (log_m - log_q), -m

    return terms


def adaptive_kl(alpha: float = 0.5, head: str = "roll") -> DivergenceFn:
    """g_head · KL(p ‖ q) + g_tail · KL(q ‖ p) (AKL, arXiv 2404.02657).

    g_head and g_tail are the shares of Σ|p − q| in the teacher's head and tail, constants for the gradient. Both are ½ where
    p = q. ``head="roll"``: the tail is the least likely tokens whose summed probability is at most α. ``head="paper"``: the
    head is the most likely token and the following ones whose summed probability is at most α.
    """
    if not 0 <= alpha <= 1:
        raise LimbeckError(f"adaptive_kl needs adaptive_kl_alpha in [0, 1], got {alpha}.")
    if head not in ("roll", "paper"):
        raise LimbeckError(f'adaptive_kl has head "roll" or "paper", got {head!r}.')

    @needs_vocab_reduction
    def terms(
        p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, reducer: VocabReducer = NO_SHARDING
    ) -> tuple[Tensor, Tensor]:
        everywhere, gap = reducer.all_gather(torch.stack([p, (p - q).abs()])).unbind()
        ordered, order = everywhere.sort(dim=-1, descending=head == "paper")
        within = ordered.cumsum(dim=-1) <= alpha
        if head == "paper":
            within[..., :1] = True
        part = (gap.gather(-1, order) * within).sum(-1, keepdim=True)
        total = gap.sum(-1, keepdim=True)
        share = torch.where(total > 0, part / total.clamp_min(torch.finfo(p.dtype).tiny), 0.5)
        g_tail = share if head == "roll" else 1 - share
        forward, reverse = p * (log_p - log_q), q * (log_q - log_p)
        return (1 - g_tail) * forward + g_tail * reverse, g_tail * (reverse + q) - (1 - g_tail) * p

    return terms


class _ClosedForm(torch.autograd.Function):
    """Values [rows] whose gradient is formed from the registered weight, as in the fused loss."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, divergence_fn: DivergenceFn) -> Tensor:
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        q = log_q.exp()
        value, weight = evaluate(divergence_fn, log_p.exp(), q, log_p, log_q)
        ctx.save_for_backward(weight - q * weight.sum(-1, keepdim=True))
        return value.sum(-1)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].unsqueeze(-1), None, None


def divergence(name: str, **parameters: Any) -> Callable[..., Tensor]:
    """Return the closed form of a divergence on whole logits.

    It is a callable ``(student_logits [N, V], teacher_logits [N, V'], temperature=1.0, teacher_temperature=None) -> [N]`` that
    backpropagates to the student's logits. Columns beyond the smaller of V and V' are ignored. ``teacher_temperature`` defaults
    to ``temperature``. Half precision is computed in float32. Values are in nats, without a factor τ². A logit of −∞ has
    probability 0.

    Raises LimbeckError for an unknown name or parameter; when called, for shapes or temperatures that do not fit, on a CPU for
    a value that is infinite (see ``docs/objectives.md``), and in a backward pass with ``create_graph=True``.
    """
    divergence_fn = make_divergence(name, **parameters)

    def closed_form(
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
    ) -> Tensor:
        if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
            raise LimbeckError(
                f"student and teacher must give logits of the same positions, got {list(student_logits.shape)} and "
                f"{list(teacher_logits.shape)}."
            )
        vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])
        tau_t = temperature if teacher_temperature is None else teacher_temperature
        if not (temperature > 0 and tau_t > 0):
            raise LimbeckError(f"temperatures must be above 0, got {temperature} (student) and {tau_t} (teacher).")
        student_logits, teacher_logits = student_logits[..., :vocab], teacher_logits[..., :vocab]
        check_support(divergence_fn, student_logits, teacher_logits)
        student, teacher = (
            (logits.to(torch.promote_types(logits.dtype, torch.float32)) / tau).clamp_min(LOWEST)
            for logits, tau in ((student_logits, temperature), (teacher_logits, tau_t))
        )
        return _ClosedForm.apply(student, teacher.detach(), divergence_fn)

    return closed_form


def check_support(divergence_fn: DivergenceFn, student: Tensor | None, teacher: Tensor | None) -> None:
    """Raise LimbeckError if only one side excludes a token and the divergence is infinite there. Does nothing on a GPU.

    student, teacher: logits or biases that broadcast to [..., vocab], where −∞ excludes a token; None excludes nothing.
    """
    sides = {"student": student, "teacher": teacher}
    if any(x is not None and x.device.type != "cpu" for x in sides.values()):
        return  # reading the result would be a sync
    excluded = {side: None if x is None or not x.numel() else _excluded(x) for side, x in sides.items()}
    for side, other in (("student", "teacher"), ("teacher", "student")):
        mine, theirs = excluded[side], excluded[other]
        if mine is None or not is_infinite_where_zero(divergence_fn, side):
            continue
        alone = mine if theirs is None else mine & ~theirs
        if bool(alone.any()):
            token = int(alone.reshape(-1, alone.shape[-1]).any(0).nonzero()[0])
            raise LimbeckError(
                f"the divergence is infinite: the {side} excludes token {token} (a logit or bias of −∞) and the {other} does "
                f"not; remove the −∞, exclude the token on both sides, or use a divergence that stays finite, such as "
                "js_divergence."
            )


def _excluded(x: Tensor) -> Tensor | None:
    return x <= EXCLUDED if bool(x.detach().amin() <= EXCLUDED) else None
