"""Validation by writing: the student answers the validation prompts, and the environment compares the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from limbeck.config import DistillConfig
from limbeck.data.examples import Examples
from limbeck.errors import LimbeckError
from limbeck.strategies.world import World
from limbeck.train.answers import NumberedPrompt
from limbeck.train.build.data import Data
from limbeck.train.rollout_source import RolloutSource
from limbeck.train.sample_files import sample_row, save_samples
from limbeck.train.samples import STUDENT, Sample, answer_starts
from limbeck.train.step_source import StepSource
from limbeck.train.writer import WritingCounts

_SEED = 0x7E57  # keeps the random numbers apart from those of training


class RolloutValidation:
    """Measures the answers to the validation prompts. The same random numbers are drawn every time.

    Args:
        config: of the run, with ``validation.rollout``.
        world: the processes of the student.
        data: of the run, with the validation rows.
        source: of the run's steps, whose generator and environment are used.

    Raises:
        LimbeckError: if the environment cannot use the validation rows.
    """

    def __init__(self, config: DistillConfig, world: World, data: Data, source: StepSource) -> None:
        settings = config.effective_validation.rollout
        assert settings is not None and config.rollout is not None and data.held_out is not None
        if not isinstance(source, RolloutSource) or source.scorer is None:
            raise LimbeckError(
                f"validation.rollout writes with the generator of step_source = rollout, and step_source is "
                f"{config.effective_step_source}; remove one of them."
            )
        source.scorer.check(data.held_out, "validation rows")
        self._settings, self._world, self._source = settings, world, source
        self._examples: Examples = data.held_out
        self._tokenizer, self._output_dir = data.tokenizer, config.output_dir
        starts = answer_starts(data.held_out)
        rows = range(min(len(data.held_out), settings.max_samples or len(data.held_out)))
        self._prompts = [
            NumberedPrompt(tuple(data.held_out.row(row)[0][: starts[row]].tolist()), row, number)
            for row in rows
            for number in range(settings.num_generations)
        ]
        changes = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "max_tokens": settings.max_new_tokens,
        }
        self._changes = {name: value for name, value in changes.items() if value is not None}
        self._seed = int(np.random.default_rng((config.seed, _SEED)).integers(2**62))

    def run(self, step: int, show: Callable[[str], None]) -> dict[str, float]:
        """The metrics of the current student. Saves all answers as ``rollouts/val-<step>.jsonl`` and shows some.
        Collective.
        """
        writer = self._source.writer
        of_training, writer.counts = writer.counts, WritingCounts()
        try:
            samples = self._source.answers.write(self._prompts, self._examples, STUDENT, self._seed, **self._changes)
        finally:
            writer.counts = of_training
        if self._world.is_main:
            save_samples(self._output_dir, f"val-{step}", samples, self._tokenizer)
            for sample in samples[: self._settings.print_samples]:
                row = sample_row(sample, self._tokenizer)
                reward = "unknown" if sample.reward is None else f"{sample.reward:g}"
                why = f" ({sample.reason})" if sample.reason else ""
                show(f"prompt: {row['prompt']}\nanswer: {row['completion']}\nreward: {reward}{why}\n")
        return _metrics(samples)


def _metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """An answer whose reward is not known counts as wrong."""
    return {
        "val/accuracy": float(np.mean([sample.reward or 0.0 for sample in samples])),
        "val/mean_length": float(np.mean([sample.num_answer_tokens for sample in samples])),
        "val/truncated_share": float(np.mean([not sample.finished for sample in samples])),
        "val/reward_unknown_share": float(np.mean([sample.reward is None for sample in samples])),
    }
