"""Adds the tokens of a teacher with another tokenizer to batches, each span weighted so that the loss is a mean over
all spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from limbeck.data import Batch, StepBatch, Translator
from limbeck.strategies.world import World


def add_teacher_tokens(batches: Sequence[StepBatch], translator: Translator, world: World) -> list[StepBatch]:
    """The batches with the teacher's tokens. Every rank must call it with equally many batches.

    The loss divides by the weight of the supervised tokens of all ``batches``. Each span's weight is multiplied by that
    weight over the weight of all spans, so that the divergence is divided by the spans instead.
    """
    translated = [[translator.translate(micro) for micro in batch.micro_batches] for batch in batches]
    views = [micro.teacher_tokens for micros in translated for micro in micros if micro.teacher_tokens is not None]
    counts = torch.tensor(
        [sum(view.total_weight for view in views), sum(view.aligned_tokens for view in views)], dtype=torch.float64
    )
    spans, aligned = world.sum(counts).tolist()
    factor = sum(batch.normalizer for batch in batches) / spans if spans else 0.0
    share = aligned / max(sum(batch.num_supervised for batch in batches), 1)
    return [
        replace(batch, micro_batches=tuple(_weighted(micro, factor) for micro in micros), aligned_share=share)
        for batch, micros in zip(batches, translated, strict=True)
    ]


def _weighted(micro: Batch, factor: float) -> Batch:
    assert micro.teacher_tokens is not None
    spans = micro.teacher_tokens.spans
    return replace(
        micro, teacher_tokens=replace(micro.teacher_tokens, spans=replace(spans, weight=spans.weight * factor))
    )
