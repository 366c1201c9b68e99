"""Distillation between models with different tokenizers: their distributions are compared span by span.

A *span* is a stretch of text at whose both ends both tokenizers have a token boundary. At the first position of a span each
model has one distribution over its own tokens. The chain rule extends it to the text of the span. With q_i the student's
distribution at the span's i-th token s_i, the student's row is

    Q(span) = Π q_i(s_i)      Q(s_1) = q_1(s_1) − Q(span)      Q(v) = q_1(v) for every other token v

It sums to 1. Its entries are: the span is written; the span is begun but not completed; another token comes first. The
teacher's row P is formed in the same way from its own tokens. If one model writes the span with a single token that the other
vocabulary has too, that token counts as writing the span on the other side.

    hybrid   D(P, Q) over the span and the common tokens, both sides renormalized over these, plus
             rest_weight · Σ |sort P − sort Q| over the tokens of one vocabulary only
    uld      Σ |sort P − sort Q| over all entries (Universal Logit Distillation, arXiv 2402.12030)

    loss = [ (1 − w) Σ u CE  +  w Σ u_g (hybrid or uld) ] / normalizer

D is renormalized because the tokens of one vocabulary only have no counterpart. Without it, the gradient would raise tokens of
the student alone until their total matches the teacher's.

With equal vocabularies every span is one token, and hybrid equals the loss of ``fused``. Positions are processed in chunks and
gradients are formed in the forward pass, as there.

Shapes: N supervised positions of the student, M of the teacher, S spans, V and V' the vocabularies, n rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.objectives.aligned_head import AlignedHead
from limbeck.objectives.checks import check_chunk_size, check_tokens, check_width
from limbeck.objectives.chunks import compute_dtype, shared_bias
from limbeck.objectives.first_order import first_order_only
from limbeck.objectives.objective import DistillationLoss, Objective, resolve_normalizer
from limbeck.objectives.output_head import OutputHead, as_output_head
from limbeck.objectives.span_divergence import CrossTokenizer, compare
from limbeck.objectives.spans import Spans

_CHUNK_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}  # with fewer rows, reading the head limits the products
_COPIES = 8  # tensors of a chunk's size that are alive at once


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
    """Compute cross-entropy and distillation loss between models with different tokenizers, from the last hidden states.

    Args:
        student_hidden: [N, Hs], at the student's supervised positions.
        student_head: [V, Hs] or an ``OutputHead``.
        teacher_hidden: [M, Ht], at the teacher's positions that predict the tokens of the spans.
        teacher_head: [V', Ht] or an ``OutputHead``.
        labels: [N] int64, the token that each position of the student must predict.
        teacher_labels: [M] int64, the same for the teacher.
        spans: which positions form which span.
        cross: how the vocabularies are compared.
        objective: the divergence, temperatures and kd_weight.
        weights: [N], u, multiplies the cross-entropy of each position, default 1.
        normalizer: divides both sums, default N. ``spans.weight`` = N / S makes the second sum a mean over spans. A tensor of 0
            gives loss 0 and zero gradients.
        chunk_size: positions per chunk. The default fits in 512 MiB with temporaries on a CPU, and in 2 GiB on a GPU.

    Returns:
        A ``DistillationLoss``. Entropies and agreement are those of the rows P and Q, summed like the divergence.

    Raises:
        LimbeckError: for shapes that do not fit, for an objective that needs equal vocabularies (top-k, estimators on sampled
            tokens), on a CPU for tokens outside the vocabularies, and in a backward pass with ``create_graph=True``.

    Half-precision inputs are multiplied in half precision. Everything else is computed in float32, or in float64 for float64
    inputs.
    """
    if not isinstance(objective, Objective):
        raise LimbeckError(f"objective must be an Objective, such as Objective.of('forward_kl'), got {objective!r}.")
    if objective.sampled or objective.topk:
        raise LimbeckError(
            "a cross-tokenizer loss compares whole distributions; use a divergence without logits_topk, not an estimator on "
            "sampled tokens."
        )
    student, teacher = as_output_head("student", student_head), as_output_head("teacher", teacher_head)
    sizes = cross.vocabularies.student_size, cross.vocabularies.teacher_size
    for role, head, size in (("student", student, sizes[0]), ("teacher", teacher, sizes[1])):
        if not 0 < size <= head.weight.shape[0]:
            raise LimbeckError(
                f"the {role}'s vocabulary of {size} does not fit the {head.weight.shape[0]} rows of its output head."
            )
    check_width("student", student_hidden, student)
    check_width("teacher", teacher_hidden, teacher)
    _check_positions(student_hidden, labels, weights, teacher_hidden, teacher_labels, spans, sizes)
    check_chunk_size(chunk_size)
    dtype = compute_dtype(student_hidden, student.weight)
    options = _CrossTokenizerOptions(
        objective=objective,
        cross=cross,
        spans=spans,
        student=student,
        teacher=teacher,
        teacher_hidden=teacher_hidden.detach(),
        labels=labels,
        teacher_labels=teacher_labels,
        weights=weights,
        normalizer=resolve_normalizer(
            normalizer,
            None,
            labels.numel(),
            torch.float64 if dtype is torch.float64 else torch.float32,
            student_hidden.device,
        ),
        dtype=dtype,
        chunk_size=chunk_size,
        wants_grad=torch.is_grad_enabled(),
    )
    loss, stats = _CrossTokenizerLoss.apply(student_hidden, student.weight, student.bias, options)
    return DistillationLoss(loss, *torch.cat([stats, stats.new_zeros(3)]).unbind())  # no top-k, no policy gradient


def _check_positions(
    student: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    teacher: Tensor,
    teacher_labels: Tensor,
    spans: Spans,
    sizes: tuple[int, int],
) -> None:
    """Raise LimbeckError unless labels, weights and spans fit the hidden states."""
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
class _CrossTokenizerOptions:
    """The arguments that are not differentiated, after checks and defaults."""

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
        """The precision of everything but the matrix products."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32


class _CrossTokenizerLoss(torch.autograd.Function):
    """As ``FusedHeadLoss``: the forward pass forms the gradients, and the first backward returns them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _CrossTokenizerOptions
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(options.wants_grad and need for need in ctx.needs_input_grad[:3])
        loss, stats, grads = _ChunkedLoss(hidden, weight, bias, options, needs).run()
        ctx.save_for_backward(hidden, weight, bias)
        ctx.options, ctx.needs, ctx.grads = options, needs, grads
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            hidden, weight, bias = ctx.saved_tensors
            grads = _ChunkedLoss(hidden, weight, bias, ctx.options, ctx.needs).run()[2]
        scale = outputs[0] / ctx.options.normalizer
        inputs = zip(grads, ctx.saved_tensors, strict=True)
        return (*(None if grad is None else grad.mul_(scale).to(like.dtype) for grad, like in inputs), None)


class _ChunkedLoss:
    """Loss and gradients, chunk by chunk. Gradients are not yet divided by the normalizer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: _CrossTokenizerOptions,
        needs: tuple[bool, ...],
    ) -> None:
        self.options, self.hidden, self.needs = options, hidden, needs
        self.vocabularies = options.cross.vocabularies_on(hidden.device)
        vs, vt, like = (
            options.cross.vocabularies.student_size,
            options.cross.vocabularies.teacher_size,
            options.accumulate,
        )
        self.head_s, self.b_s = AlignedHead(weight, vs, options.dtype), shared_bias(bias, vs, like)
        self.head_t = AlignedHead(options.teacher.weight, vt, options.teacher.weight.dtype)
        self.b_t = shared_bias(options.teacher.bias, vt, like)
        per_row = _COPIES * (vs + vt) * torch.finfo(like).bits // 8
        budget = _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES["cuda"])
        self.chunk = max(1, options.chunk_size or budget // per_row)
        zeros = lambda shape: torch.zeros(shape, dtype=like, device=hidden.device)  # noqa: E731
        self.d_hidden = zeros(hidden.shape) if needs[0] else None
        self.d_weight = zeros(weight.shape) if needs[1] else None
        self.d_bias = zeros(weight.shape[:1]) if needs[2] else None
        self.stats = zeros(5)  # kd, ce, both entropies, agreement
        count = len(options.spans) + 1  # the last is for positions in no span
        self.later_s, self.later_t, self.slope = zeros(count), zeros(count), zeros(count)
        self.several_s, self.several_t = zeros(count), zeros(count)

    def run(self) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        objective = self.options.objective
        with torch.autocast(self.hidden.device.type, enabled=False), torch.no_grad():
            self._teacher_later_tokens()
            self._student_later_tokens()
            self._compare_spans()
            if any(self.needs):
                self._student_later_gradients()
        stats = self.stats / self.options.normalizer
        w, squared = objective.kd_weight, objective.temperature**2 if objective.squared else 1.0
        loss = (1 - w) * stats[1] + w * squared * stats[0]
        return loss, stats, (self.d_hidden, self.d_weight, self.d_bias)

    # Pass 1: a span's later tokens contribute only their summed log-probability.

    def _teacher_later_tokens(self) -> None:
        spans, tau = self.options.spans, self.options.objective.teacher_temperature
        for part in self._chunks(spans.teacher_rest):
            index, owner = spans.teacher_rest[part], spans.teacher_rest_span[part]
            log_p = (self._teacher_logits(index) / tau).log_softmax(-1)
            log_prob = log_p.gather(-1, self.options.teacher_labels[index, None]).squeeze(-1)
            self.later_t.index_add_(0, owner, log_prob)
            self.several_t.index_add_(0, owner, torch.ones_like(log_prob))

    def _student_later_tokens(self) -> None:
        spans = self.options.spans
        for part in self._chunks(spans.student_rest):
            index, owner = spans.student_rest[part], spans.student_rest_span[part]
            ce, log_prob = self._at_target(self._student_logits(self._product(index)), index)
            self.stats[1] += ce.sum()
            self.later_s.index_add_(0, owner, log_prob)
            self.several_s.index_add_(0, owner, torch.ones_like(log_prob))

    # Pass 2: compare the whole distributions at the first positions.

    def _compare_spans(self) -> None:
        options, spans, objective = self.options, self.options.spans, self.options.objective
        squared = objective.temperature**2 if objective.squared else 1.0
        for part in self._chunks(spans.weight):
            first_s, first_t = spans.student_first[part], spans.teacher_first[part]
            z = self._product(first_s).requires_grad_(any(self.needs))
            later = self.later_s[:-1][part].clone().requires_grad_(any(self.needs))
            log_p = (self._teacher_logits(first_t) / objective.teacher_temperature).log_softmax(-1)
            weight = spans.weight[part].to(options.accumulate)
            with torch.set_grad_enabled(any(self.needs)):
                logits = self._student_logits(z)
                ce, _ = self._at_target(logits, first_s)
                teacher_row = (options.teacher_labels[first_t], self.later_t[:-1][part], self.several_t[:-1][part] > 0)
                student_row = (options.labels[first_s], later, self.several_s[:-1][part] > 0)
                value, others = compare(
                    (logits / objective.temperature).log_softmax(-1),
                    *student_row,
                    log_p,
                    *teacher_row,
                    options.cross,
                    self.vocabularies,
                    objective.divergence_fn,
                )
                kd = (value * weight).sum()
                total = (1 - objective.kd_weight) * ce.sum() + objective.kd_weight * squared * kd
            self.stats += torch.stack([kd.detach(), ce.detach().sum(), *(others * weight).sum(-1)])
            if any(self.needs):
                dz, slope = torch.autograd.grad(total, [z, later], allow_unused=True)
                self._backpropagate(dz, first_s)
                if slope is not None:
                    self.slope[:-1][part] = slope

    # Pass 3: the gradients for the spans' later tokens.

    def _student_later_gradients(self) -> None:
        spans, w = self.options.spans, self.options.objective.kd_weight
        for part in self._chunks(spans.student_rest):
            index = spans.student_rest[part]
            z = self._product(index).requires_grad_()
            with torch.enable_grad():
                ce, log_prob = self._at_target(self._student_logits(z), index)
                total = (1 - w) * ce.sum() + (log_prob * self.slope[spans.student_rest_span[part]]).sum()
            self._backpropagate(torch.autograd.grad(total, z)[0], index)

    def _chunks(self, rows: Tensor) -> Iterator[slice]:
        for start in range(0, rows.shape[0], self.chunk):
            yield slice(start, start + self.chunk)

    def _product(self, index: Tensor) -> Tensor:
        return self._logits(self.head_s, self.hidden, index).to(self.options.accumulate)

    def _student_logits(self, z: Tensor) -> Tensor:
        return self.options.student.transform(z, self.b_s, self.options.accumulate)

    def _teacher_logits(self, index: Tensor) -> Tensor:
        z = self._logits(self.head_t, self.options.teacher_hidden, index)
        return self.options.teacher.transform(z, self.b_t, self.options.accumulate)

    @staticmethod
    def _logits(head: AlignedHead, hidden: Tensor, index: Tensor) -> Tensor:
        out = head.buffer(len(index))
        return head.logits(hidden[index].to(out.dtype), out)

    def _at_target(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy [n] and tempered log-probability [n] of the labels."""
        target, tau = self.options.labels[index, None], self.options.objective.temperature
        plain = logits.log_softmax(-1).gather(-1, target).squeeze(-1)
        log_prob = plain if tau == 1.0 else (logits / tau).log_softmax(-1).gather(-1, target).squeeze(-1)
        return (
            -plain if self.options.weights is None else -plain * self.options.weights[index].to(plain.dtype)
        ), log_prob

    def _backpropagate(self, dz: Tensor, index: Tensor) -> None:
        """Add the gradient dz [n, V] of a chunk's products to those of the hidden states, the head and the bias."""
        if self.d_bias is not None:
            self.d_bias[: dz.shape[1]] += dz.sum(0)
        dz = torch.nn.functional.pad(dz.to(self.options.dtype), (0, self.head_s.width - self.head_s.vocab))
        if self.d_hidden is not None:
            self.d_hidden[index] = self.head_s.hidden_grad(dz).to(self.d_hidden.dtype)
        if self.d_weight is not None:
            self.head_s.add_weight_grad(self.d_weight, dz, self.hidden[index].to(self.options.dtype))
