"""What travels from the data to the models: token ids, the shifted labels, and the counts that the loss divides by.

Nothing here knows a model, a teacher or a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100
"""The label of a position that is not supervised."""


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
    real:         [num_tokens] int64, the places in the flattened input_ids that are not padding; None when there is none.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    num_tokens: int
    supervised: Tensor
    weights: Tensor | None = None
    real: Tensor | None = None

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        num_tokens: int,
        weights: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Batch:
        """A batch with its supervised places found from the labels; ``weights`` [batch, time] or None."""
        supervised = (labels.flatten() != IGNORE).nonzero().squeeze(-1)
        chosen = None if weights is None else weights.flatten()[supervised]
        return cls(input_ids, labels, position_ids, num_tokens, supervised, chosen, real)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; copies from pinned memory overlap with compute."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            supervised=self.supervised.to(device, non_blocking=True),
            position_ids=None if self.position_ids is None else self.position_ids.to(device, non_blocking=True),
            weights=None if self.weights is None else self.weights.to(device, non_blocking=True),
            real=None if self.real is None else self.real.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step: this rank's micro-batches and the counts over *all* ranks.

    micro_batches:  every rank has equally many.
    num_supervised: supervised tokens over all ranks and micro-batches.
    normalizer:     the sum of their weights (their number when all count alike); the loss divides by it once.
    num_tokens:     non-padding tokens over all ranks.
    num_slots:      batch × time summed over all ranks; 1 − num_tokens / num_slots is the padding share.
    """

    micro_batches: tuple[Batch, ...]
    num_supervised: int
    normalizer: float
    num_tokens: int
    num_slots: int
