"""Every divergence, as two formulas.

With p the teacher's and q the student's distribution at one position, a divergence D(p, q) gives, for every entry of the
vocabulary, its share of the value and the weight w = q · ∂D/∂q. The gradient for the student's logits z, q = softmax(z/τ),
is then always

    ∂D/∂z = (w − q · Σw) / τ

so one pair of formulas serves the closed form, the fused head-and-loss and the top-k path alike. A term c · q in w (c the
same for the whole row) cancels in that expression and is left out below.

Nothing here knows a model, a mask or a chunk. Shapes: every tensor is [rows, vocab]; the value sums over the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import LimbeckError

Formulas = Callable[[Tensor, Tensor, Tensor, Tensor], "tuple[Tensor, Tensor]"]
"""(p, q, log p, log q), each [rows, vocab] → (value, w), each [rows, vocab]."""

LOWEST = -1e30
"""Stands for a logit of −∞: its probability is 0, and 0 · log 0 stays 0 instead of NaN."""

_REGISTRY: dict[str, Callable[..., Formulas]] = {}


def register(make: Callable[..., Formulas]) -> Callable[..., Formulas]:
    """Make a divergence known under its function's name. ``make(**parameters)`` returns the two formulas."""
    _REGISTRY[make.__name__] = make
    return make


def names() -> list[str]:
    """The registered divergences."""
    return sorted(_REGISTRY)


def formulas(name: str, **parameters: float) -> Formulas:
    """The two formulas of divergence ``name``; raises LimbeckError for a name that is not registered."""
    if name not in _REGISTRY:
        raise LimbeckError(f"there is no divergence called {name!r}; the known ones are {', '.join(names())}.")
    return _REGISTRY[name](**parameters)


@register
def forward_kl() -> Formulas:
    """KL(p ‖ q) = Σ p (log p − log q): the student covers whatever the teacher does (Hinton et al., 2015)."""

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return p * (log_p - log_q), -p

    return terms


@register
def reverse_kl() -> Formulas:
    """KL(q ‖ p) = Σ q (log q − log p): the student stays where the teacher is (MiniLLM, arXiv 2306.08543)."""

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        value = q * (log_q - log_p)
        return value, value

    return terms


@register
def js_divergence(beta: float = 0.5) -> Formulas:
    """Generalised Jensen-Shannon, M = βp + (1−β)q: β KL(p ‖ M) + (1−β) KL(q ‖ M) (GKD, arXiv 2306.13649).

    β = ½ is the ordinary one. D vanishes at both ends, where D/β tends to the forward and D/(1−β) to the reverse KL; as in
    GKD, β = 0 and β = 1 stand for those two limits.
    """
    if not 0 <= beta <= 1:
        raise LimbeckError(f"js_divergence needs beta in [0, 1], got {beta}.")
    if beta == 0:
        return forward_kl()
    if beta == 1:
        return reverse_kl()
    log_beta, log_rest = math.log(beta), math.log1p(-beta)

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
        weight = (1 - beta) * q * (log_q - log_m)
        return weight + beta * p * (log_p - log_m), weight

    return terms


@register
def skewed_forward_kl(skew: float = 0.1) -> Formulas:
    """KL(p ‖ m), m = λp + (1−λ)q (DistiLLM's skew KL, arXiv 2402.03898). λ = 0 is the forward KL."""
    if not 0 <= skew < 1:
        raise LimbeckError(f"skewed_forward_kl needs skew_lambda in [0, 1), got {skew}.")
    if skew == 0:
        return forward_kl()
    log_skew, log_rest = math.log(skew), math.log1p(-skew)

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = torch.logaddexp(log_p + log_skew, log_q + log_rest)
        return p * (log_p - log_m), -p * torch.exp(log_q - log_m + log_rest)

    return terms


@register
def skewed_reverse_kl(skew: float = 0.1) -> Formulas:
    """KL(q ‖ m), m = (1−λ)p + λq (DistiLLM's skew reverse KL, arXiv 2402.03898). λ = 0 is the reverse KL."""
    if not 0 <= skew < 1:
        raise LimbeckError(f"skewed_reverse_kl needs skew_lambda in [0, 1), got {skew}.")
    if skew == 0:
        return reverse_kl()
    log_skew, log_rest = math.log(skew), math.log1p(-skew)

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = torch.logaddexp(log_p + log_rest, log_q + log_skew)
        value = q * (log_q - log_m)
        return value, value - q * torch.exp(log_q - log_m + log_skew)

    return terms


@register
def adaptive_kl(alpha: float = 0.5) -> Formulas:
    """g_head · KL(p ‖ q) + g_tail · KL(q ‖ p) (AKL, arXiv 2404.02657).

    The tail is the teacher's least likely tokens whose summed probability stays within α, the head is the rest; g_head and
    g_tail are the shares of Σ|p − q| found in each, taken as constants. Where p = q both are ½, so nothing is 0/0.
    """
    if not 0 <= alpha <= 1:
        raise LimbeckError(f"adaptive_kl needs adaptive_kl_alpha in [0, 1], got {alpha}.")

    def terms(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        ascending, order = p.sort(dim=-1)
        gap = (p - q).abs()
        in_tail = ascending.cumsum(dim=-1) <= alpha
        tail = (gap.gather(-1, order) * in_tail).sum(-1, keepdim=True)
        total = gap.sum(-1, keepdim=True)
        g_tail = torch.where(total > 0, tail / total.clamp_min(torch.finfo(p.dtype).tiny), 0.5)
        forward, reverse = p * (log_p - log_q), q * (log_q - log_p)
        return (1 - g_tail) * forward + g_tail * reverse, g_tail * reverse - (1 - g_tail) * p

    return terms


class _Rows(torch.autograd.Function):
    """Values [rows] whose gradient is the registered weight, so that the closed form and the fused path cannot differ."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, terms: Formulas) -> Tensor:
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        q = log_q.exp()
        value, weight = terms(log_p.exp(), q, log_p, log_q)
        ctx.save_for_backward(weight - q * weight.sum(-1, keepdim=True))
        return value.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].unsqueeze(-1), None, None


def divergence(name: str, **parameters: float) -> Callable[..., Tensor]:
    """The closed form of a divergence on whole logits.

    Returns a callable ``(student_logits [N, V], teacher_logits [N, V'], temperature=1.0, teacher_temperature=None) -> [N]``
    that backpropagates to the student's logits. V and V' may differ by padding: columns beyond the shorter do not exist. An
    unset teacher temperature is the student's.
    """
    terms = formulas(name, **parameters)

    def closed_form(
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
    ) -> Tensor:
        vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])
        tau_t = temperature if teacher_temperature is None else teacher_temperature
        student = (student_logits[..., :vocab] / temperature).clamp_min(LOWEST)
        teacher = (teacher_logits[..., :vocab] / tau_t).clamp_min(LOWEST)
        return _Rows.apply(student, teacher.detach(), terms)

    return closed_form
