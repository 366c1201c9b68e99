"""The divergence of two rows of a span, over two vocabularies. ``cross_tokenizer`` defines the terms.

Shapes: n spans, V and V' the vocabularies of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.objectives.divergences import DivergenceFn, evaluate
from limbeck.objectives.first_order import first_order_only
from limbeck.objectives.spans import Vocabularies

KINDS = ("uld", "hybrid")
MERGES = ("span", "gold")

_MOVED_TO_SPAN = -100.0  # log-probability of a token whose mass is the span's: e⁻¹⁰⁰ keeps every divergence finite


@dataclass(frozen=True)
class CrossTokenizer:
    """How two vocabularies are compared. The docstring of ``cross_tokenizer`` defines the terms.

    Args:
        vocabularies: which tokens the two have in common.
        kind: ``hybrid`` or ``uld``.
        rest_weight: multiplies the sorted difference in ``hybrid``, 0 or more.
        merge: ``span``, or ``gold`` for the rows of TRL's GOLD. There, every probability at the first position is multiplied by
            those of the span's later tokens, Q(v) = q_1(v) · Π_{i>1} q_i(s_i), and there is no entry for the span. Such a row
            sums to that product, not to 1.

    Raises LimbeckError for an unknown name or a negative ``rest_weight``.
    """

    vocabularies: Vocabularies
    kind: str = "hybrid"
    rest_weight: float = 1.0
    merge: str = "span"
    _on_device: dict[torch.device, Vocabularies] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("merge", MERGES)):
            if getattr(self, name) not in known:
                raise LimbeckError(f"cross_tokenizer has no {name} {getattr(self, name)!r}; use {' or '.join(known)}.")
        if not self.rest_weight >= 0:
            raise LimbeckError(f"cross_tokenizer's rest_weight must be 0 or more, got {self.rest_weight}.")

    def vocabularies_on(self, device: torch.device) -> Vocabularies:
        """Return the vocabularies on ``device``. They are copied once."""
        if device not in self._on_device:
            self._on_device[device] = self.vocabularies.to(device)
        return self._on_device[device]


def compare(
    log_q: Tensor,
    student_token: Tensor,
    student_later: Tensor,
    student_several: Tensor,
    log_p: Tensor,
    teacher_token: Tensor,
    teacher_later: Tensor,
    teacher_several: Tensor,
    cross: CrossTokenizer,
    vocabularies: Vocabularies,
    divergence_fn: DivergenceFn,
) -> tuple[Tensor, Tensor]:
    """Return the value [n] at n spans, and student entropy, teacher entropy and agreement [3, n].

    The value backpropagates to log_q and student_later. log_q [n, V], log_p [n, V']: the distributions at the first positions.
    token [n]: the span's first token. later [n]: the summed log-probability of its later tokens, 0 without any. several [n]
    bool: whether there are later tokens.
    """
    if cross.merge == "gold":
        rows_q, rows_p = log_q + student_later.unsqueeze(-1), log_p + teacher_later.unsqueeze(-1)
    else:
        also_q = also_p = torch.full_like(student_token, -1)
        if cross.kind == "hybrid":
            also_q = _also(vocabularies.student_of[teacher_token], teacher_several, student_token)
            also_p = _also(vocabularies.teacher_of[student_token], student_several, teacher_token)
        rows_q = span_row(log_q, student_token, student_later, student_several, also_q)
        rows_p = span_row(log_p, teacher_token, teacher_later, teacher_several, also_p)
    with torch.no_grad():
        others = torch.stack(
            [
                -(rows_q.exp() * rows_q).sum(-1),
                -(rows_p.exp() * rows_p).sum(-1),
                _agreement(rows_q, rows_p, student_token, teacher_token, cross, vocabularies),
            ]
        )
    if cross.kind == "uld":
        return _sorted_difference(rows_q.exp(), rows_p.exp()), others

    shift = rows_q.shape[1] - log_q.shape[1]  # 1 where there is a column for the span
    common_q = torch.cat([rows_q[:, :shift], rows_q.index_select(-1, vocabularies.student_common + shift)], -1)
    common_p = torch.cat([rows_p[:, :shift], rows_p.index_select(-1, vocabularies.teacher_common + shift)], -1)
    rest_q = rows_q.index_select(-1, vocabularies.student_rest + shift)
    rest_p = rows_p.index_select(-1, vocabularies.teacher_rest + shift)
    if cross.merge == "span":
        common_q, common_p = common_q.log_softmax(-1), common_p.log_softmax(-1)
    value = _SpanDivergence.apply(common_q, common_p, divergence_fn)
    if cross.rest_weight and rest_q.shape[1] + rest_p.shape[1]:
        value = value + cross.rest_weight * _sorted_difference(rest_q.exp(), rest_p.exp())
    return value, others


def span_row(log_q: Tensor, token: Tensor, later: Tensor, several: Tensor, also: Tensor | None = None) -> Tensor:
    """Return log Q [n, 1 + V]. Column 0: the span is written. Column 1 + v: token v comes first and the span is not written.

    log_q [n, V]; token, later, several [n]: as in ``compare``. also [n]: another token that writes the whole span, or −1.
    """
    token, later, several = token.unsqueeze(-1), later.unsqueeze(-1), several.unsqueeze(-1)
    first = log_q.gather(-1, token)
    whole = first + later
    # 1 − Π is at least the rounding error of Π, so that the divergence stays finite if Π rounds to 1.
    left = first + torch.log(-torch.expm1(later.clamp_max(-torch.finfo(log_q.dtype).eps)))
    moved = torch.full_like(left, _MOVED_TO_SPAN)
    left = torch.where(several, left, moved)
    rows = log_q.scatter(-1, token, left)
    if also is not None:
        known = also.unsqueeze(-1) >= 0
        column = torch.where(known, also.unsqueeze(-1), token)
        whole = torch.where(known, torch.logaddexp(whole, log_q.gather(-1, column)), whole)
        rows = rows.scatter(-1, column, torch.where(known, moved, left))
    return torch.cat([whole, rows], -1)


def _also(twin: Tensor, other_several: Tensor, token: Tensor) -> Tensor:
    """The own id [n] of the other side's token, where that is the whole span and differs from the own first token, else −1."""
    return torch.where(other_several | (twin == token), -1, twin)


def _agreement(
    rows_q: Tensor, rows_p: Tensor, token_q: Tensor, token_p: Tensor, cross: CrossTokenizer, vocabularies: Vocabularies
) -> Tensor:
    """1 where the most likely entries of both rows are the same: the span, or a common token."""
    best_q, best_p = rows_q.argmax(-1), rows_p.argmax(-1)
    if cross.merge == "gold":
        same_span = (best_q == token_q) & (best_p == token_p)
    else:
        same_span = (best_q == 0) & (best_p == 0)
        best_q, best_p = best_q - 1, best_p - 1
    same_token = (best_q >= 0) & (best_p >= 0) & (vocabularies.teacher_of[best_q.clamp_min(0)] == best_p)
    return (same_span | same_token).to(rows_q.dtype)


def _sorted_difference(q: Tensor, p: Tensor) -> Tensor:
    """Σ |sort↓ q − sort↓ p| [n]. The shorter row is padded with zeros."""
    q, p = q.sort(-1, descending=True).values, p.sort(-1, descending=True).values
    both = min(q.shape[-1], p.shape[-1])
    difference = (q[:, :both] - p[:, :both]).abs().sum(-1)
    return difference + q[:, both:].sum(-1) + p[:, both:].sum(-1)


class _SpanDivergence(torch.autograd.Function):
    """A registered divergence of log-probabilities [n, C]; its weight w = q · ∂D/∂q is the gradient for log q."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, divergence_fn: DivergenceFn) -> Tensor:
        value, weight = evaluate(divergence_fn, log_p.exp(), log_q.exp(), log_p, log_q)
        ctx.save_for_backward(weight)
        return value.sum(-1)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return weight * grads[0].unsqueeze(-1), None, None
