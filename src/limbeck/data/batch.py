"""The data structures that a training step passes to the models: token ids, shifted labels, and counts.

Nothing here depends on a model, a teacher or a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from limbeck.data.masks import IGNORE
from limbeck.objectives.spans import Spans


@dataclass(frozen=True)
class TeacherTokens:
    """The documents of a batch, tokenised by a teacher with another tokenizer.

    input_ids:      [documents, time'] int64, right-padded; [1, tokens] of concatenated documents for a packed batch.
    position_ids, documents, cu_seqlens: as in ``Batch``, for a packed batch; else None.
    supervised:     [M] int64; positions in the flattened input_ids that predict a token of a span, in order.
    labels:         [M] int64; the tokens to predict at those positions.
    spans:          which of them correspond to which of the batch's supervised positions; its weights sum to total_weight.
    aligned_tokens: number of supervised tokens of the batch that are in a span.
    """

    input_ids: Tensor
    supervised: Tensor
    labels: Tensor
    spans: Spans
    aligned_tokens: int
    total_weight: float
    position_ids: Tensor | None = None
    documents: tuple[int, ...] | None = None
    cu_seqlens: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> TeacherTokens:
        """Returns a copy with ``change`` applied to every tensor."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, spans=self.spans.each(change), **changed)


def cumulative_lengths(documents: Sequence[int]) -> Tensor:
    """[documents + 1] int32: where each of the documents of a packed row starts, then the length of the row."""
    return torch.tensor([0, *accumulate(documents)], dtype=torch.int32)


def _indices_of_each(values: Tensor) -> tuple[Tensor, ...]:
    """For 0, 1, … up to the largest of ``values`` [n]: the indices at which it occurs."""
    return tuple((values == value).nonzero().squeeze(-1) for value in range(int(values.max()) + 1))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows right-padded to a common length or, with packing, one row of concatenated documents.

    input_ids:      [batch, time] int64.
    labels:         [batch, time] int64; ``labels[b, t]`` is the token that position t must predict (already shifted by
                    one), or ``IGNORE``.
    position_ids:   [batch, time] int64, restarting at 0 with every packed document; None when each row is one document.
    num_tokens:     number of tokens that are not padding.
    supervised:     [supervised] int64; positions in the flattened labels that are not ``IGNORE``, in order. Computed when
                    the batch is made, so that a step needs no GPU synchronisation to find them.
    weights:        [supervised] float32, the factor of each position's loss; None when all are 1.
    real:           [num_tokens] int64, positions in the flattened input_ids that are not padding; None without padding.
    documents:      with packing, the lengths of the documents in the one row. The last includes the padding. Python
                    integers, because attention needs them on the host.
    objectives:     one tensor of indices into ``supervised`` for each objective; None when all positions have the same one.
    sampled_log_probs: [supervised] float32, log-probability of each label under the distribution that it was sampled from,
                    NaN where it was not sampled; None when no label was.
    advantages:     [supervised] float32, the advantage of each label in a policy gradient; None without one.
    is_stale:       whether ``sampled_log_probs`` are those of weights before the ones that are trained.
    cu_seqlens:     with packing, their ``cumulative_lengths``, which attention kernels read on the device. All layers of
                    student and teacher share them.
    teacher_tokens: the input of a teacher with another tokenizer; None when both models share one.
    teacher_batch:  the same documents after the prompts that only the teacher reads, with the same labels in the same order;
                    None when both models read the same.
    row_ids:        dataset row number of each document, in order; the same row has the same number after a resume and on
                    any number of ranks. Empty for a batch that does not come from a dataset.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    num_tokens: int
    supervised: Tensor
    weights: Tensor | None = None
    real: Tensor | None = None
    documents: tuple[int, ...] | None = None
    teacher_tokens: TeacherTokens | None = None
    row_ids: tuple[int, ...] = ()
    cu_seqlens: Tensor | None = None
    objectives: tuple[Tensor, ...] | None = None
    sampled_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    is_stale: bool = False
    teacher_batch: Batch | None = None

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
        row_ids: tuple[int, ...] = (),
        objectives: Tensor | None = None,
        sampled_log_probs: Tensor | None = None,
        advantages: Tensor | None = None,
    ) -> Batch:
        """Creates a batch and finds its supervised positions from the labels.

        weights, objectives (indices), sampled_log_probs and advantages are [batch, time] or None.
        """
        supervised = (labels.flatten() != IGNORE).nonzero().squeeze(-1)

        def chosen(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.flatten()[supervised]

        which = chosen(objectives)
        return cls(
            input_ids,
            labels,
            position_ids,
            num_tokens,
            supervised,
            chosen(weights),
            real,
            documents,
            row_ids=row_ids,
            cu_seqlens=None if documents is None else cumulative_lengths(documents),
            objectives=None if which is None or not len(which) else _indices_of_each(which),
            sampled_log_probs=chosen(sampled_log_probs),
            advantages=chosen(advantages),
        )

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on ``device``. Copies from pinned memory overlap with computation."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def shard_for_context_parallel(self, rank: int, size: int) -> tuple[Batch, Batch]:
        """Returns the part of the batch that context-parallel ``rank`` of ``size`` computes.

        The first result has the whole rows, but only the supervised and real positions of this rank's shard. The second has
        only the shard of each row, with positions counted within it; its ``documents`` are those of the whole row, whose
        length is padded to a multiple of ``size``.
        """
        if size == 1:
            return self, self
        time = self.labels.shape[1]
        width = -(-time // size)
        padding, low = width * size - time, rank * width
        real = torch.arange(self.labels.numel()) if self.real is None else self.real

        def in_shard(positions: Tensor) -> Tensor:
            return (positions % time >= low) & (positions % time < low + width)

        def within_shard(positions: Tensor) -> Tensor:
            return positions // time * width + positions % time - low

        def shard(x: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(x, (0, padding), value=value)[:, low : low + width].contiguous()

        mine = in_shard(self.supervised)
        rank_of = mine.cumsum(0) - 1  # index of a supervised position among those of the shard
        supervised, real = self.supervised[mine], real[in_shard(real)]
        of_shard: dict[str, Any] = {
            name: None if values is None else values[mine]
            for name, values in (
                ("weights", self.weights),
                ("sampled_log_probs", self.sampled_log_probs),
                ("advantages", self.advantages),
            )
        }
        objectives = None if self.objectives is None else tuple(rank_of[one[mine[one]]] for one in self.objectives)
        theirs = None if self.teacher_batch is None else self.teacher_batch.select(mine.nonzero().squeeze(-1))
        whole = replace(self, supervised=supervised, real=real, objectives=objectives, teacher_batch=theirs, **of_shard)
        positions = torch.arange(time).expand_as(self.labels) if self.position_ids is None else self.position_ids
        documents = None if self.documents is None else (*self.documents[:-1], self.documents[-1] + padding)
        own = replace(
            whole,
            input_ids=shard(self.input_ids, 0),
            labels=shard(self.labels, IGNORE),
            position_ids=shard(positions, 0),
            supervised=within_shard(supervised),
            real=within_shard(real),
            documents=documents,
            cu_seqlens=None if documents is None else cumulative_lengths(documents),
            teacher_batch=None,
        )
        return whole, own

    def select(self, indices: Tensor) -> Batch:
        """Returns the batch with some of its supervised positions only: ``indices`` [n] into ``supervised``."""
        names = ("supervised", "weights", "sampled_log_probs", "advantages")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, objectives=None, **{name: value[indices] for name, value in given.items()})

    def pin_memory(self) -> Batch:
        """Returns the batch in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.teacher_batch is not None:
            changed["teacher_batch"] = self.teacher_batch._each(change)
        if self.teacher_tokens is not None:
            changed["teacher_tokens"] = self.teacher_tokens.each(change)
        if self.objectives is not None:
            changed["objectives"] = tuple(change(indices) for indices in self.objectives)
        return replace(self, **changed)


@dataclass(frozen=True)
class StepCounts:
    """What an optimizer step's loss and metrics are divided by.

    num_supervised: number of supervised tokens.
    normalizer:     sum of their weights; their number when all weights are 1.
    num_tokens:     number of tokens that are not padding.
    num_slots:      sum of batch × time; 1 − num_tokens / num_slots is the share of padding.
    """

    num_supervised: int
    normalizer: float
    num_tokens: int
    num_slots: int

    @classmethod
    def of(cls, micro_batches: Sequence[Batch]) -> StepCounts:
        """Counts ``micro_batches``. Weights are summed exactly, so the result does not depend on their order."""
        return cls(
            num_supervised=sum(len(batch.supervised) for batch in micro_batches),
            normalizer=math.fsum(
                weight
                for batch in micro_batches
                for weight in ([len(batch.supervised)] if batch.weights is None else batch.weights.tolist())
            ),
            num_tokens=sum(batch.num_tokens for batch in micro_batches),
            num_slots=sum(batch.labels.numel() for batch in micro_batches),
        )


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step as one rank computes it.

    micro_batches: every rank has the same number.
    counts:        of this rank's micro-batches. The loss is divided by the sum over all ranks.
    aligned_share: with a teacher of another tokenizer, the share of the supervised tokens that are compared.
    """

    micro_batches: tuple[Batch, ...]
    counts: StepCounts
    aligned_share: float | None = None

    @classmethod
    def of(cls, micro_batches: Sequence[Batch]) -> StepBatch:
        """Creates a step from its micro-batches and counts them."""
        return cls(tuple(micro_batches), StepCounts.of(micro_batches))

    @property
    def num_supervised(self) -> int:
        """See ``StepCounts``."""
        return self.counts.num_supervised

    @property
    def normalizer(self) -> float:
        """See ``StepCounts``."""
        return self.counts.normalizer

    @property
    def num_tokens(self) -> int:
        """See ``StepCounts``."""
        return self.counts.num_tokens

    @property
    def num_slots(self) -> int:
        """See ``StepCounts``."""
        return self.counts.num_slots

    def pin_memory(self) -> StepBatch:
        """Returns the step with its micro-batches in page-locked memory."""
        return replace(self, micro_batches=tuple(batch.pin_memory() for batch in self.micro_batches))
