"""What travels from the data to the models: token ids, the shifted labels, and the counts that the loss divides by.

Nothing here knows a model, a teacher or a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.data.masks import IGNORE
from limbeck.objectives.spans import Spans


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

    def each(self, change: Callable[[Tensor], Tensor]) -> Translation:
        """The same with every tensor changed."""
        return replace(
            self,
            input_ids=change(self.input_ids),
            supervised=change(self.supervised),
            labels=change(self.labels),
            spans=self.spans.each(change),
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows right-padded to a common length, or with packing one row of documents end to end.

    input_ids:    [batch, time] int64.
    labels:       [batch, time] int64; ``labels[b, t]`` is the token that position t must predict (already shifted by
                  one), or ``IGNORE``.
    position_ids: [batch, time] int64, restarting at 0 with every packed document; None when each row is one document.
    documents:    with packing, the lengths of the documents in the one row, whose last takes the padding (if any) along;
                  numbers on the host, which attention needs without asking a GPU.
    num_tokens:   tokens that are not padding.
    supervised:   [supervised] int64; the places in the flattened labels that are not ``IGNORE``, in order. Counted where the
                  batch is made, so that a GPU need not be asked in the middle of a step.
    weights:      [supervised] float32, what multiplies each one's loss; None when all count alike.
    real:         [num_tokens] int64, the places in the flattened input_ids that are not padding; None when there is none.
    translation:  what a teacher with another tokenizer reads instead; None when both models share one.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    num_tokens: int
    supervised: Tensor
    weights: Tensor | None = None
    real: Tensor | None = None
    documents: tuple[int, ...] | None = None
    translation: Translation | None = None

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        num_tokens: int,
        weights: Tensor | None = None,
        real: Tensor | None = None,
        documents: tuple[int, ...] | None = None,
    ) -> Batch:
        """A batch with its supervised places found from the labels; ``weights`` [batch, time] or None."""
        supervised = (labels.flatten() != IGNORE).nonzero().squeeze(-1)
        chosen = None if weights is None else weights.flatten()[supervised]
        return cls(input_ids, labels, position_ids, num_tokens, supervised, chosen, real, documents)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; copies from pinned memory overlap with compute."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def stretch(self, place: int, places: int) -> tuple[Batch, Batch]:
        """What one of ``places`` ranks that divide the rows' time has to do with this batch.

        First the whole rows with only the supervised and real places in its stretch, then the stretch itself, its places
        counted in it; ``documents`` stay those of the whole row, padded to a multiple of ``places``.
        """
        if places == 1:
            return self, self
        time = self.labels.shape[1]
        width = -(-time // places)
        more, low = width * places - time, place * width
        real = torch.arange(self.labels.numel()) if self.real is None else self.real

        def here(index: Tensor) -> Tensor:
            return (index % time >= low) & (index % time < low + width)

        def within(index: Tensor) -> Tensor:
            return index // time * width + index % time - low

        def cut(x: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(x, (0, more), value=value)[:, low : low + width].contiguous()

        supervised, real = self.supervised[here(self.supervised)], real[here(real)]
        weights = None if self.weights is None else self.weights[here(self.supervised)]
        whole = replace(self, supervised=supervised, real=real, weights=weights)
        positions = torch.arange(time).expand_as(self.labels) if self.position_ids is None else self.position_ids
        own = replace(
            whole,
            input_ids=cut(self.input_ids, 0),
            labels=cut(self.labels, IGNORE),
            position_ids=cut(positions, 0),
            supervised=within(supervised),
            real=within(real),
            documents=None if self.documents is None else (*self.documents[:-1], self.documents[-1] + more),
        )
        return whole, own

    def pinned(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.translation is not None:
            changed["translation"] = self.translation.each(change)
        return replace(self, **changed)


@dataclass(frozen=True)
class StepBatch:
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

    def pinned(self) -> StepBatch:
        """The same step with its micro-batches in page-locked memory."""
        return replace(self, micro_batches=tuple(batch.pinned() for batch in self.micro_batches))
