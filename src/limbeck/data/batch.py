"""What travels from the data to the models: token ids, the shifted labels, and the counts that the loss divides by.

Nothing here knows a model, a teacher or a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.objectives.cross_tokenizer import Spans

IGNORE = -100
"""The label of a position that is not supervised."""


@dataclass(frozen=True)
class Translation:
    """The same documents in the tokens of a teacher with another tokenizer.

    input_ids:      [documents, time'] int64, right-padded.
    supervised:     [M] int64; the places in the flattened input_ids that predict a token of a span, in order.
    labels:         [M] int64; those tokens.
    spans:          which of them face which of the batch's supervised positions; its weights sum to total_weight.
    aligned_tokens: supervised tokens of the batch that are in a span.
    """

    input_ids: Tensor
    supervised: Tensor
    labels: Tensor
    spans: Spans
    aligned_tokens: int
    total_weight: float

    def to(self, device: torch.device) -> Translation:
        """The same on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            supervised=self.supervised.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            spans=self.spans.to(device),
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch: sequences right-padded to a common length.

    input_ids:    [batch, time] int64.
    labels:       [batch, time] int64; ``labels[b, t]`` is the token that position t must predict (already shifted by
                  one), or ``IGNORE``.
    position_ids: [batch, time] int64, restarting at 0 with every packed document; None when each row is one document.
    num_tokens:   tokens that are not padding.
    supervised:   [supervised] int64; the places in the flattened labels that are not ``IGNORE``, in order. Counted where the
                  batch is made, so that a GPU need not be asked in the middle of a step.
    weights:      [supervised] float32, what multiplies each one's loss; None when all count alike.
    translation:  what a teacher with another tokenizer reads instead; None when both models share one.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    num_tokens: int
    supervised: Tensor
    weights: Tensor | None = None
    translation: Translation | None = None

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        num_tokens: int,
        weights: Tensor | None = None,
    ) -> Batch:
        """A batch with its supervised places found from the labels; ``weights`` [batch, time] or None."""
        supervised = (labels.flatten() != IGNORE).nonzero().squeeze(-1)
        chosen = None if weights is None else weights.flatten()[supervised]
        return cls(input_ids, labels, position_ids, num_tokens, supervised, chosen)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; copies from pinned memory overlap with compute."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            supervised=self.supervised.to(device, non_blocking=True),
            position_ids=None if self.position_ids is None else self.position_ids.to(device, non_blocking=True),
            weights=None if self.weights is None else self.weights.to(device, non_blocking=True),
            translation=None if self.translation is None else self.translation.to(device),
        )


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step: this rank's micro-batches and the counts over *all* ranks.

    micro_batches:  every rank has equally many.
    num_supervised: supervised tokens over all ranks and micro-batches.
    normalizer:     the sum of their weights (their number when all count alike); the loss divides by it once.
    num_tokens:     non-padding tokens over all ranks.
    num_slots:      batch × time summed over all ranks; 1 − num_tokens / num_slots is the padding share.
    aligned_share:  with a teacher of another tokenizer, the share of the supervised tokens that are compared.
    """

    micro_batches: tuple[Batch, ...]
    num_supervised: int
    normalizer: float
    num_tokens: int
    num_slots: int
    aligned_share: float | None = None
