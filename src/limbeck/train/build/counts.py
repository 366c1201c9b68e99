"""The counts of a global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from limbeck.data.batch import StepBatch
from limbeck.strategies.world import World


def reduce_counts(batches: Sequence[StepBatch], world: World) -> list[StepBatch]:
    """``batches`` with their counts summed over all ranks, so that the loss is divided once by the count of a global
    batch.

    Ranks that work on the same rows count them once. Every rank must call it with equally many batches.
    """
    if world.size == 1 or not batches:
        return list(batches)
    local = [(b.counts.num_supervised, b.counts.normalizer, b.counts.num_tokens, b.counts.num_slots) for b in batches]
    summed = world.sum(torch.tensor(local, dtype=torch.float64)) / world.dims.model_parallel_size
    return [
        replace(
            batch,
            counts=replace(
                batch.counts,
                num_supervised=round(supervised),
                normalizer=normalizer,
                num_tokens=round(tokens),
                num_slots=round(slots),
            ),
        )
        for batch, (supervised, normalizer, tokens, slots) in zip(batches, summed.tolist(), strict=True)
    ]
