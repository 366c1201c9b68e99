"""Answers that the teacher writes, for sequence-level distillation.

Kim and Rush (2016), "Sequence-Level Knowledge Distillation" (https://arxiv.org/abs/1606.07947).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from limbeck.config import DistillConfig
from limbeck.models import ModelSource, load_model, model_outline
from limbeck.rollout import Prompt
from limbeck.rollout.hf import HfGenerator
from limbeck.rollout.student import writing_dtype
from limbeck.strategies.world import World
from limbeck.train.samples import TEACHER, Sample
from limbeck.train.writer import Writer

_STREAM = zlib.crc32(b"teacher")  # its random numbers are others than those of the student


class TeacherWriter:
    """Writes one answer for each sample (row, number), and keeps it for later steps.

    An answer does not depend on the step, so a resumed run writes those that it needs again, equal up to rounding of the
    logits. Every rank holds the teacher a second time, in float32 on a CPU and in bfloat16 on a GPU.

    Args:
        config: of the run. The teacher must have the student's tokenizer.
        world: the processes of the student.
        tokenizer: of the student.
        stop_token_ids: end an answer, beside the teacher's own end tokens.
    """

    def __init__(self, config: DistillConfig, world: World, tokenizer: object, stop_token_ids: Sequence[int]) -> None:
        source = ModelSource.from_args(config.teacher.model_args, "teacher")
        dtype = writing_dtype(world.device.type)
        assert config.rollout is not None
        generator = HfGenerator(
            model_outline(source, dtype), tokenizer, world.device, config.rollout.slots, config.sequence_length
        )
        generator.update_weights(load_model(source, dtype, config.seed).state_dict().items(), 0)
        at_once = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_staleness": 0})})
        self._writer = Writer(at_once, world, stop_token_ids, generator)
        self._seed = config.seed
        self._written: dict[tuple[int, int], Sample] = {}

    def write(
        self,
        samples: Sequence[tuple[int, int]],
        prompt: Callable[[int], tuple[int, ...]],
        weight: Callable[[int], float],
    ) -> dict[tuple[int, int], Sample]:
        """The samples (row, number). Collective.

        Args:
            samples: row and number of each.
            prompt: token ids of the prompt of a row.
            weight: factor of the loss of the tokens of a row's answer.
        """
        missing = [sample for sample in samples if sample not in self._written]
        # Each number has its own seed, so that an answer does not depend on which other numbers are missing.
        for number in sorted({number for _, number in missing}):
            rows = [row for row, other in missing if other == number]
            seed = int(np.random.default_rng((self._seed, number, _STREAM)).integers(2**62))
            for one in self._writer.write([Prompt(prompt(row), row) for row in rows], seed):
                row = one.prompt.row_id
                self._written[row, number] = Sample.written(
                    row, number, TEACHER, one.prompt.token_ids, one.token_ids, None, one.finished, weight(row)
                )
        return {sample: self._written[sample] for sample in samples}

    def close(self) -> None:
        """Free the device."""
        self._writer.close()
