"""The part of ``limbeck check`` that reads the data: tokenizers, templates, rows and the first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.data.batch import StepBatch
from limbeck.registry import STEP_SOURCES
from limbeck.strategies.base import dims_of
from limbeck.strategies.world import World
from limbeck.train.build.data import Data, make_data
from limbeck.train.build.teacher_tokens import add_teacher_tokens
from limbeck.train.checkpoint import load_checkpoint
from limbeck.train.rollout_source import prompts_per_step
from limbeck.train.saving import find_checkpoint
from limbeck.train.scoring import Scorer


class FirstRank(World):
    """The first of the student's processes, on the CPU, where the others do not exist."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def max(self, value: float) -> float:
        return value

    def barrier(self) -> None:
        """There is nothing to wait for."""


def describe_data(config: DistillConfig) -> str:
    """Tokenize the data as training does, into the same cache, and describe the rows and the first batch, which is that at
    which the run would resume.

    Raises:
        LimbeckError: for whatever ends the training before its first step: tokenizers, templates, rows, columns, a damaged
            checkpoint, or one of other data or another number of rows per step.
    """
    ranks = len(config.device_mapping or [0])
    world = FirstRank(0, ranks, torch.device("cpu"), dims=dims_of(config.student, ranks, "student"))
    data = make_data(config, world)
    if config.rollout is not None and config.rollout.environment is not None:
        scorer = Scorer(config, world, data.tokenizer)
        try:
            scorer.check(data.examples, "training rows")
        finally:
            scorer.close()
    return f"{data.report}\n{_describe_first_batch(config, world, data)}"


def _describe_first_batch(config: DistillConfig, world: World, data: Data) -> str:
    if config.rollout is not None:
        if config.effective_step_source == "rollout":
            prompts_per_step(config, world)
        return "first batch: written by the student when it trains"
    source = STEP_SOURCES.get(config.effective_step_source)(config, world, data)
    resume, step = find_checkpoint(config), 0
    try:
        if resume is not None:
            checkpoint = load_checkpoint(resume)
            step = checkpoint.step
            source.load_state_dict(checkpoint.state["data"])
        batch: StepBatch = source.next(step)
    finally:
        source.close()
    if data.translator is not None:
        (batch,) = add_teacher_tokens([batch], data.translator, world)
    shapes = " + ".join("×".join(map(str, micro.input_ids.shape)) for micro in batch.micro_batches)
    after = f" after step {step}" if step else ""
    text = (
        f"first batch of each rank{after}: {shapes} positions, "
        f"{sum(micro.num_tokens for micro in batch.micro_batches):,} tokens, "
        f"{sum(len(micro.supervised) for micro in batch.micro_batches):,} supervised"
    )
    return (
        text
        if data.translator is None
        else f"{text}, {batch.aligned_share:.1%} of them aligned with the teacher's tokens"
    )
