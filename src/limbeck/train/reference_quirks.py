"""Deviations of other systems from the objective (``objective_faults``), for users who must reproduce their numbers.

A quirk changes the positions at which the divergence is computed, the vocabulary, the divisor, or the rows. The divergence and
the cross-entropy are therefore computed separately, which takes the time of two losses. Without quirks this module is not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from limbeck.config.schema import FAULTS
from limbeck.data import Examples
from limbeck.data.batch import Batch
from limbeck.data.masks import IGNORE
from limbeck.objectives import DistillationLoss, Objective, OutputHead, fused_linear_distillation
from limbeck.teachers.signals import Signal


@dataclass(frozen=True)
class ReferenceQuirks:
    """The quirks that are enabled.

    Attributes:
        on: names among ``FAULTS``.
        base_vocab: size of the tokenizer's vocabulary without added tokens.
    """

    on: frozenset[str]
    base_vocab: int

    @classmethod
    def from_names(cls, names: Iterable[str], base_vocab: int) -> ReferenceQuirks | None:
        """None if ``names`` is empty."""
        on = frozenset(names)
        assert on <= set(FAULTS)
        return cls(on, base_vocab) if on else None

    def compared_batch(self, batch: Batch) -> Batch:
        """The batch whose ``supervised`` positions are those of the divergence. Its labels have no meaning."""
        if "every_token" in self.on:
            real = batch.real
            positions = torch.arange(batch.labels.numel(), device=batch.labels.device) if real is None else real
        elif "unshifted_mask" in self.on:
            # A supervised position predicts the next token, and without the shift that token's position is used. It is in
            # the same row, because the last position of a row predicts nothing.
            positions = batch.supervised + 1
        else:
            return replace(batch, labels=batch.labels.clamp_min(0))
        return replace(batch, supervised=positions, weights=None, labels=torch.zeros_like(batch.labels))

    def normalizers(
        self, batch: Batch, micro_batches: int, normalizer: float | Tensor, tokens: float | Tensor
    ) -> tuple[float | Tensor, float | Tensor]:
        """The divisors of cross-entropy and divergence, without a division by the size of the vocabulary."""
        if "mean_of_micro_batches" in self.on:
            mine = max(batch.supervised.numel(), 1) if batch.weights is None else batch.weights.sum().clamp_min(1e-30)
            normalizer, tokens = mine * micro_batches, max(batch.num_tokens, 1) * micro_batches
        return normalizer, tokens if "every_token" in self.on else normalizer

    def loss(
        self,
        hidden: Tensor,
        head: OutputHead,
        batch: Batch,
        signal: Signal,
        objective: Objective,
        vocab: int,
        normalizers: tuple[float | Tensor, float | Tensor],
    ) -> DistillationLoss:
        """The objective with the quirks.

        Args:
            hidden: [batch · time, H] of the student.
            head: the student's output head.
            batch: the micro-batch.
            signal: the teacher's signal for ``compared_batch(batch)``.
            objective: without quirks.
            vocab: size of the shared vocabulary.
            normalizers: divisors of cross-entropy and divergence.
        """
        assert signal.hidden is not None and signal.head is not None
        w, theirs, ce_vocab = objective.kd_weight, signal.head, vocab
        ours = head
        if "zero_padded_vocabulary" in self.on:
            ce_vocab, vocab = len(head.weight), max(len(head.weight), len(theirs.weight))
            ours, theirs = _padded(head, vocab), _padded(theirs, vocab)
        if "base_vocabulary" in self.on:
            vocab = min(vocab, self.base_vocab)
        by_ce, by_kd = normalizers
        if "mean_over_vocabulary" in self.on:
            by_kd = by_kd * vocab
        with torch.set_grad_enabled(w < 1 and torch.is_grad_enabled()):
            ce = fused_linear_distillation(
                hidden.index_select(0, batch.supervised),
                head,
                None,
                None,
                batch.labels.flatten().index_select(0, batch.supervised),
                objective=replace(objective, kd_weight=0.0),
                vocab_size=ce_vocab,
                weights=batch.weights,
                normalizer=by_ce,
                all_supervised=True,
            )
        there = self.compared_batch(batch)
        kd = fused_linear_distillation(
            hidden.index_select(0, there.supervised),
            ours,
            signal.hidden,
            theirs,
            torch.zeros_like(there.supervised),
            objective=replace(objective, kd_weight=1.0),
            vocab_size=vocab,
            weights=there.weights,
            normalizer=by_kd,
            all_supervised=True,
        )
        return kd._replace(loss=(1 - w) * ce.loss + w * kd.loss, ce=ce.ce)


def train_padding(examples: Examples, length: int, pad_id: int) -> Examples:
    """The rows, filled to ``length`` tokens with ``pad_id``, which models attend to and predict like the tokens of prompt and
    answer. Rows have at most ``length`` tokens.
    """
    tokens = np.full((len(examples), length), pad_id, np.int32)
    tokens[np.arange(length) < examples.lengths[:, None]] = examples.tokens
    labels = np.full_like(tokens, IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    offsets = np.arange(len(examples) + 1, dtype=np.int64) * length
    return replace(
        examples, tokens=tokens.ravel(), labels=labels.ravel(), offsets=offsets, weights=None, supervised=None
    )


def _padded(head: OutputHead, rows: int) -> OutputHead:
    """The head, extended to ``rows`` rows by rows whose logits are 0."""
    more = rows - len(head.weight)
    pad = torch.nn.functional.pad
    return replace(
        head,
        weight=pad(head.weight, (0, 0, 0, more)),
        bias=None if head.bias is None else pad(head.bias, (0, more)),
    )
