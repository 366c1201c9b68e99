"""Distillation between two vocabularies: one text, cut by two tokenizers, compared span by span.

A *span* is a stretch of text at whose both ends both tokenizers have a boundary. At its first position each model has one
distribution over its own tokens; the chain rule carries it to what both models speak of, the span's text. With q_i the
distribution at the span's i-th token s_i, the student's row is

    Q(span) = Π q_i(s_i)      Q(s_1) = q_1(s_1) − Q(span)      Q(v) = q_1(v) for every other token v

which sums to 1: *the span is written*, or it is begun and left, or another token comes first. The teacher's row P is made
alike from its own tokens. If one model writes the span with a single token that the other one has as well, that token counts
as writing the span there too.

    hybrid   D(P, Q) over the span and the tokens that both vocabularies have, both sides renormalised over these, plus
             rest_weight · Σ |sort P − sort Q| over the tokens that one side alone has
    uld      Σ |sort P − sort Q| over everything (Universal Logit Distillation, arXiv 2402.12030)

    loss = [ (1 − w) Σ u CE  +  w Σ u_g (that) ] / normalizer

D is renormalised because a token that the teacher alone has says nothing of one that the student alone has: both sides'
mass outside the common tokens could only be made equal by raising tokens that nobody asked for.

With equal vocabularies every span is one token and hybrid is the ordinary loss. Logits are never held whole: positions are
walked in chunks, and gradients are formed where the logits are, as in ``fused``.

Shapes: N supervised positions of the student, M of the teacher, S spans, V and V' the vocabularies, n rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.errors import LimbeckError
from limbeck.objectives.checks import check_tokens, check_width
from limbeck.objectives.chunks import add_product, compute_dtype, shared_bias
from limbeck.objectives.divergences import DivergenceFn, evaluate
from limbeck.objectives.elementwise import _logits
from limbeck.objectives.fused import DistillationLoss, Objective, OutputHead
from limbeck.objectives.spans import Spans, Vocabularies

KINDS = ("uld", "hybrid")
MERGES = ("span", "gold")

_NOTHING = (
    -100.0
)  # the log-probability of a token whose mass has gone to the span: e⁻¹⁰⁰, so that no divergence is infinite
_CHUNK_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}  # fewer rows, and the products wait for the head's memory
_COPIES = 8  # of a chunk's rows that are alive at once


@dataclass(frozen=True)
class CrossTokenizer:
    """How two vocabularies are compared; the module says what the words mean.

    rest_weight: multiplies the sorted difference in ``hybrid``. merge: ``span``, or ``gold``: every token's probability at
    the first position is multiplied by that of the span's later tokens, Q(v) = q_1(v) · Π_{i>1} q_i(s_i), and there is no
    entry for the span. Such a row sums to that product and not to 1; this is TRL's GOLD, for comparison.
    Raises LimbeckError for names that are not known.
    """

    vocabularies: Vocabularies
    kind: str = "hybrid"
    rest_weight: float = 1.0
    merge: str = "span"
    _where: dict[torch.device, Vocabularies] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("merge", MERGES)):
            if getattr(self, name) not in known:
                raise LimbeckError(f"cross_tokenizer has no {name} {getattr(self, name)!r}; use {' or '.join(known)}.")
        if not self.rest_weight >= 0:
            raise LimbeckError(f"cross_tokenizer's rest_weight must be 0 or more, got {self.rest_weight}.")

    def on(self, device: torch.device) -> Vocabularies:
        """The vocabularies on ``device``, copied once."""
        if device not in self._where:
            self._where[device] = self.vocabularies.to(device)
        return self._where[device]


@torch.compiler.disable
def cross_tokenizer_distillation(
    student_hidden: Tensor,
    student_head: Tensor | OutputHead,
    teacher_hidden: Tensor,
    teacher_head: Tensor | OutputHead,
    labels: Tensor,
    teacher_labels: Tensor,
    spans: Spans,
    *,
    cross: CrossTokenizer,
    objective: Objective,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
) -> DistillationLoss:
    """Cross-entropy and distillation between models whose tokenizers differ, from the last hidden states.

    student_hidden [N, Hs], labels [N]: the student's supervised positions and the token that each must predict.
    teacher_hidden [M, Ht], teacher_labels [M]: the teacher's positions that predict the tokens of the spans. Heads are weight
    matrices or ``OutputHead``. weights [N]: u, what multiplies each position's cross-entropy; default 1.
    normalizer: what both sums are divided by; default N (then ``spans.weight`` of N / S makes the second one a mean over
    spans). chunk_size: positions per chunk; default as many as fit in 512 MiB with their temporaries on a CPU, 2 GiB on a GPU.

    Returns a ``DistillationLoss``; entropies and agreement are those of the rows P and Q, summed like the divergence. Half
    precision is multiplied in half precision, everything else is float32, float64 stays float64. Raises LimbeckError for
    an objective that needs equal vocabularies (top-k, or estimators on sampled tokens).
    """
    if not isinstance(objective, Objective):
        raise LimbeckError(f"objective must be an Objective, such as Objective.of('forward_kl'), got {objective!r}.")
    if objective.sampled or objective.topk:
        raise LimbeckError(
            "across tokenizers whole distributions are compared; use a divergence, without logits_topk, not an estimator on "
            "sampled tokens."
        )
    student = student_head if isinstance(student_head, OutputHead) else OutputHead(student_head)
    teacher = teacher_head if isinstance(teacher_head, OutputHead) else OutputHead(teacher_head)
    sizes = cross.vocabularies.student_size, cross.vocabularies.teacher_size
    for role, head, size in (("student", student, sizes[0]), ("teacher", teacher, sizes[1])):
        if not 0 < size <= head.weight.shape[0]:
            raise LimbeckError(
                f"the {role}'s vocabulary of {size} does not fit the {head.weight.shape[0]} rows of its output head."
            )
    check_width("student", student_hidden, student)
    check_width("teacher", teacher_hidden, teacher)
    _check_positions(student_hidden, labels, weights, teacher_hidden, teacher_labels, spans, sizes)
    if chunk_size is not None and chunk_size < 1:
        raise LimbeckError(f"chunk_size must be 1 or more positions, got {chunk_size}; leave it out to have it chosen.")
    job = _Job(
        objective=objective,
        cross=cross,
        spans=spans,
        student=student,
        teacher=teacher,
        teacher_hidden=teacher_hidden.detach(),
        labels=labels,
        teacher_labels=teacher_labels,
        weights=weights,
        normalizer=max(labels.numel(), 1) if normalizer is None else normalizer,
        dtype=compute_dtype(student_hidden, student.weight),
        chunk_size=chunk_size,
        wants_grad=torch.is_grad_enabled(),
    )
    loss, stats = _CrossLoss.apply(student_hidden, student.weight, student.bias, job)
    return DistillationLoss(loss, *torch.cat([stats, stats.new_zeros(2)]).unbind())  # there is no top-k


def _check_positions(
    student: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    teacher: Tensor,
    teacher_labels: Tensor,
    spans: Spans,
    sizes: tuple[int, int],
) -> None:
    """A position that is one off would train the student wrongly without a word."""
    for name, given, rows in (
        ("labels", labels, student),
        ("teacher_labels", teacher_labels, teacher),
        ("weights", weights, student),
    ):
        if given is not None and given.shape != rows.shape[:1]:
            raise LimbeckError(f"{name} must be [{len(rows)}], as many as the hidden states, got {list(given.shape)}.")
    if labels.device.type != "cpu":
        return  # on a GPU it would be a sync
    for role, tokens, size, parts in (
        ("labels", labels, sizes[0], (spans.student_first, spans.student_rest)),
        ("teacher_labels", teacher_labels, sizes[1], (spans.teacher_first, spans.teacher_rest)),
    ):
        named = torch.cat(parts)
        if len(named) and int(named.max()) >= len(tokens):
            raise LimbeckError(
                f"spans name position {int(named.max())}, but {role} has {len(tokens)}; give all of them."
            )
        check_tokens(role, tokens, size)


@dataclass(frozen=True)
class _Job:
    objective: Objective
    cross: CrossTokenizer
    spans: Spans
    student: OutputHead
    teacher: OutputHead
    teacher_hidden: Tensor
    labels: Tensor
    teacher_labels: Tensor
    weights: Tensor | None
    normalizer: float | Tensor
    dtype: torch.dtype
    chunk_size: int | None
    wants_grad: bool

    @property
    def accumulate(self) -> torch.dtype:
        """The precision of everything but the products."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32


class _CrossLoss(torch.autograd.Function):
    """As in ``fused``: gradients are formed in the forward pass, handed over once, and formed again for a second backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, Tensor]:
        needs = tuple(job.wants_grad and need for need in ctx.needs_input_grad[:3])
        loss, stats, grads = _Walk(hidden, weight, bias, job, needs).run()
        ctx.save_for_backward(hidden, weight, bias)
        ctx.job, ctx.needs, ctx.grads = job, needs, grads
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            hidden, weight, bias = ctx.saved_tensors
            grads = _Walk(hidden, weight, bias, ctx.job, ctx.needs).run()[2]
        scale = outputs[0] / ctx.job.normalizer
        inputs = zip(grads, ctx.saved_tensors, strict=True)
        return (*(None if grad is None else grad.mul_(scale).to(like.dtype) for grad, like in inputs), None)


class _Walk:
    """One pass over all positions. The sums are kept undivided; the normalizer comes last."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, needs: tuple[bool, ...]) -> None:
        self.job, self.hidden, self.needs = job, hidden, needs
        self.vocabularies = job.cross.on(hidden.device)
        vs, vt, like = job.cross.vocabularies.student_size, job.cross.vocabularies.teacher_size, job.accumulate
        self.w_s, self.b_s = weight[:vs].to(job.dtype), shared_bias(bias, vs, like)
        self.w_t, self.b_t = job.teacher.weight[:vt], shared_bias(job.teacher.bias, vt, like)
        per_row = _COPIES * (vs + vt) * torch.finfo(like).bits // 8
        budget = _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES["cuda"])
        self.chunk = max(1, job.chunk_size or budget // per_row)
        zeros = lambda shape: torch.zeros(shape, dtype=like, device=hidden.device)  # noqa: E731
        self.d_hidden = zeros(hidden.shape) if needs[0] else None
        self.d_weight = zeros(weight.shape) if needs[1] else None
        self.d_bias = zeros(weight.shape[:1]) if needs[2] else None
        self.stats = zeros(5)  # kd, ce, both entropies, agreement
        count = len(job.spans) + 1  # and one for positions in no span
        self.later_s, self.later_t, self.slope = zeros(count), zeros(count), zeros(count)
        self.several_s, self.several_t = zeros(count), zeros(count)

    def run(self) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        objective = self.job.objective
        with torch.autocast(self.hidden.device.type, enabled=False), torch.no_grad():
            self._teachers_later_tokens()
            self._students_later_tokens()
            self._spans()
            if any(self.needs):
                self._students_later_gradients()
        stats = self.stats / self.job.normalizer
        w, squared = objective.kd_weight, objective.temperature**2 if objective.squared else 1.0
        loss = (1 - w) * stats[1] + w * squared * stats[0]
        return loss, stats, (self.d_hidden, self.d_weight, self.d_bias)

    # Pass 1: of a span's later tokens only their summed log-probability is needed.

    def _teachers_later_tokens(self) -> None:
        spans, tau = self.job.spans, self.job.objective.teacher_temperature
        for part in self._chunks(spans.teacher_rest):
            index, owner = spans.teacher_rest[part], spans.teacher_rest_span[part]
            log_p = (self._teacher_logits(index) / tau).log_softmax(-1)
            said = log_p.gather(-1, self.job.teacher_labels[index, None]).squeeze(-1)
            self.later_t.index_add_(0, owner, said)
            self.several_t.index_add_(0, owner, torch.ones_like(said))

    def _students_later_tokens(self) -> None:
        spans = self.job.spans
        for part in self._chunks(spans.student_rest):
            index, owner = spans.student_rest[part], spans.student_rest_span[part]
            ce, said = self._at_target(self._student_logits(self._product(index)), index)
            self.stats[1] += ce.sum()
            self.later_s.index_add_(0, owner, said)
            self.several_s.index_add_(0, owner, torch.ones_like(said))

    # Pass 2: the first positions, whose whole distributions are compared.

    def _spans(self) -> None:
        job, spans, objective = self.job, self.job.spans, self.job.objective
        squared = objective.temperature**2 if objective.squared else 1.0
        for part in self._chunks(spans.weight):
            first_s, first_t = spans.student_first[part], spans.teacher_first[part]
            z = self._product(first_s).requires_grad_(any(self.needs))
            later = self.later_s[:-1][part].clone().requires_grad_(any(self.needs))
            log_p = (self._teacher_logits(first_t) / objective.teacher_temperature).log_softmax(-1)
            weight = spans.weight[part].to(job.accumulate)
            with torch.set_grad_enabled(any(self.needs)):
                logits = self._student_logits(z)
                ce, _ = self._at_target(logits, first_s)
                teacher_row = (job.teacher_labels[first_t], self.later_t[:-1][part], self.several_t[:-1][part] > 0)
                student_row = (job.labels[first_s], later, self.several_s[:-1][part] > 0)
                value, others = compare(
                    (logits / objective.temperature).log_softmax(-1),
                    *student_row,
                    log_p,
                    *teacher_row,
                    job.cross,
                    self.vocabularies,
                    objective.terms,
                )
                kd = (value * weight).sum()
                total = (1 - objective.kd_weight) * ce.sum() + objective.kd_weight * squared * kd
            self.stats += torch.stack([kd.detach(), ce.detach().sum(), *(others * weight).sum(-1)])
            if any(self.needs):
                dz, slope = torch.autograd.grad(total, [z, later], allow_unused=True)
                self._leave(dz, first_s)
                if slope is not None:
                    self.slope[:-1][part] = slope

    # Pass 3: what the spans' values ask of their later tokens.

    def _students_later_gradients(self) -> None:
        spans, w = self.job.spans, self.job.objective.kd_weight
        for part in self._chunks(spans.student_rest):
            index = spans.student_rest[part]
            z = self._product(index).requires_grad_()
            with torch.enable_grad():
                ce, said = self._at_target(self._student_logits(z), index)
                total = (1 - w) * ce.sum() + (said * self.slope[spans.student_rest_span[part]]).sum()
            self._leave(torch.autograd.grad(total, z)[0], index)

    def _chunks(self, rows: Tensor) -> Iterator[slice]:
        for start in range(0, rows.shape[0], self.chunk):
            yield slice(start, start + self.chunk)

    def _product(self, index: Tensor) -> Tensor:
        return (self.hidden[index].to(self.job.dtype) @ self.w_s.t()).to(self.job.accumulate)

    def _student_logits(self, z: Tensor) -> Tensor:
        return _logits(z, self.b_s, self.job.student.scale, self.job.student.softcap, self.job.accumulate)

    def _teacher_logits(self, index: Tensor) -> Tensor:
        z = self.job.teacher_hidden[index].to(self.w_t.dtype) @ self.w_t.t()
        return _logits(z, self.b_t, self.job.teacher.scale, self.job.teacher.softcap, self.job.accumulate)

    def _at_target(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy [n] and the tempered log-probability [n] of the written tokens."""
        target, tau = self.job.labels[index, None], self.job.objective.temperature
        plain = logits.log_softmax(-1).gather(-1, target).squeeze(-1)
        said = plain if tau == 1.0 else (logits / tau).log_softmax(-1).gather(-1, target).squeeze(-1)
        return (-plain if self.job.weights is None else -plain * self.job.weights[index].to(plain.dtype)), said

    def _leave(self, dz: Tensor, index: Tensor) -> None:
        """Carry the gradient for a chunk's products on to the hidden states, the head and the bias."""
        if self.d_bias is not None:
            self.d_bias[: dz.shape[1]] += dz.sum(0)
        dz = dz.to(self.job.dtype)
        if self.d_hidden is not None:
            self.d_hidden[index] = (dz @ self.w_s).to(self.d_hidden.dtype)
        if self.d_weight is not None:
            add_product(self.d_weight[: dz.shape[1]], dz, self.hidden[index].to(self.job.dtype))


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
    terms: DivergenceFn,
) -> tuple[Tensor, Tensor]:
    """The value [n] at n spans, which backpropagates to log_q and student_later, and both entropies and agreement [3, n].

    log_q [n, V], log_p [n, V']: the distributions at the first positions. token [n]: the span's first; later [n]: the summed
    log-probability of the others, 0 if there are none; several [n] bool: whether there are.
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
    value = _Value.apply(common_q, common_p, terms)
    if cross.rest_weight and rest_q.shape[1] + rest_p.shape[1]:
        value = value + cross.rest_weight * _sorted_difference(rest_q.exp(), rest_p.exp())
    return value, others


def span_row(log_q: Tensor, token: Tensor, later: Tensor, several: Tensor, also: Tensor | None = None) -> Tensor:
    """log Q [n, 1 + V]: in column 0 the span is written, in column 1 + v token v comes first and the span is not written.

    log_q [n, V]; token, later, several [n] as in ``compare``; also [n]: a token that writes the whole span by itself, or −1.
    """
    token, later, several = token.unsqueeze(-1), later.unsqueeze(-1), several.unsqueeze(-1)
    first = log_q.gather(-1, token)
    whole = first + later
    # 1 − Π is at least the rounding error of Π, so that a student that is sure of the rest keeps a finite divergence.
    left = first + torch.log(-torch.expm1(later.clamp_max(-torch.finfo(log_q.dtype).eps)))
    nothing = torch.full_like(left, _NOTHING)
    left = torch.where(several, left, nothing)
    rows = log_q.scatter(-1, token, left)
    if also is not None:
        known = also.unsqueeze(-1) >= 0
        place = torch.where(known, also.unsqueeze(-1), token)
        whole = torch.where(known, torch.logaddexp(whole, log_q.gather(-1, place)), whole)
        rows = rows.scatter(-1, place, torch.where(known, nothing, left))
    return torch.cat([whole, rows], -1)


def _also(twin: Tensor, other_several: Tensor, token: Tensor) -> Tensor:
    """The twin [n] of the other side's token where that one is the whole span and is not the token written here, else −1."""
    return torch.where(other_several | (twin == token), -1, twin)


def _agreement(
    rows_q: Tensor, rows_p: Tensor, token_q: Tensor, token_p: Tensor, cross: CrossTokenizer, vocabularies: Vocabularies
) -> Tensor:
    """Whether both rows' most likely entry is the same: the span, or one token that both have."""
    best_q, best_p = rows_q.argmax(-1), rows_p.argmax(-1)
    if cross.merge == "gold":
        same_span = (best_q == token_q) & (best_p == token_p)
    else:
        same_span = (best_q == 0) & (best_p == 0)
        best_q, best_p = best_q - 1, best_p - 1
    same_token = (best_q >= 0) & (best_p >= 0) & (vocabularies.teacher_of[best_q.clamp_min(0)] == best_p)
    return (same_span | same_token).to(rows_q.dtype)


def _sorted_difference(q: Tensor, p: Tensor) -> Tensor:
    """Σ |sort↓ q − sort↓ p| [n], the shorter one continued with zeros."""
    q, p = q.sort(-1, descending=True).values, p.sort(-1, descending=True).values
    both = min(q.shape[-1], p.shape[-1])
    difference = (q[:, :both] - p[:, :both]).abs().sum(-1)
    return difference + q[:, both:].sum(-1) + p[:, both:].sum(-1)


class _Value(torch.autograd.Function):
    """A registered divergence of log-probabilities [n, C]; its weight w = q · ∂D/∂q is the gradient for log q."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, terms: DivergenceFn) -> Tensor:
        value, weight = evaluate(terms, log_p.exp(), log_q.exp(), log_p, log_q)
        ctx.save_for_backward(weight)
        return value.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return weight * grads[0].unsqueeze(-1), None, None
