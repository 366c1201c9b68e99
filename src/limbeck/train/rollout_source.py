"""On-policy steps: for a share of the samples, the student writes the answer; the others have the answer of the data.

Agarwal et al. (2024), "On-Policy Distillation of Language Models" (https://arxiv.org/abs/2306.13649), algorithm 1, with the
choice made for each sample instead of each step. Everything random depends on the seed, the step and the row only, so a run
continues exactly from a checkpoint, on any number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from limbeck.config import DistillConfig
from limbeck.data import BatchStream
from limbeck.data.batch import StepBatch
from limbeck.data.masks import IGNORE
from limbeck.data.stream import make_step
from limbeck.errors import LimbeckError
from limbeck.strategies.world import World
from limbeck.train.answers import AnswerWriter, Question
from limbeck.train.build.data import Data
from limbeck.train.sample_files import save_samples
from limbeck.train.samples import DATASET, STUDENT, Sample, answer_starts, to_examples
from limbeck.train.scoring import RewardCounts, Scorer
from limbeck.train.step_source import Weights
from limbeck.train.writer import Writer, WritingCounts

_CHECKED_ROWS = 1000  # of which the answers' last token is looked at


class RolloutSource:
    """Steps of which the student writes the share ``rollout.on_policy_fraction``."""

    max_lookahead = 0

    def __init__(self, config: DistillConfig, world: World, data: Data) -> None:
        assert config.rollout is not None
        if world.dims.model_parallel_size > 1:
            raise LimbeckError(
                "rollout with a tensor_model_parallel_size, context_parallel_size or pipeline_model_parallel_size of the "
                "student above 1 is not built yet; set all to 1."
            )
        self._settings, self._seed, self._world = config.rollout, config.seed, world
        self._examples, self._stream_settings = data.examples, data.stream_settings
        training = config.student.training_args
        samples = training.per_device_train_batch_size * training.gradient_accumulation_steps * world.dims.data_size
        if samples % self._settings.num_generations:
            raise LimbeckError(
                f"rollout.num_generations = {self._settings.num_generations} does not divide the {samples} samples of a step "
                "(per_device_train_batch_size x gradient_accumulation_steps x ranks); change one of them."
            )
        prompts = replace(
            data.stream_settings,
            per_device_batch_size=samples // self._settings.num_generations,
            accumulation_steps=1,
            packing=False,
            group_by_length=False,
            max_tokens_per_microbatch=0,
        )
        self._prompts = BatchStream(data.examples, prompts)
        self.steps_per_epoch: int | None = self._prompts.steps_per_epoch
        self._starts = answer_starts(data.examples)
        self._check_room(config.sequence_length)
        self.writer = Writer(config, world, sorted({*self._settings.stop_token_ids, *self._end_tokens()}))
        self._num_samples = 0
        self.scorer: Scorer | None = None
        if self._settings.environment is not None:
            self.scorer = Scorer(config, world, data.tokenizer)
            try:
                self.scorer.check(data.examples, "training rows")
            except LimbeckError:
                self.scorer.close()
                raise
        self.answers = AnswerWriter(config, self.writer, self.scorer, data.tokenizer)
        self._rewards = RewardCounts()
        self._tokenizer, self._output_dir = data.tokenizer, config.output_dir

    def next(self, step: int) -> StepBatch:
        rows = [int(unit[0]) for unit in self._prompts.take()]
        numbered = [(row, number) for row in rows for number in range(self._settings.num_generations)]
        origins = {sample: self._origin(step, *sample) for sample in numbered}
        written = self._write(step, [sample for sample in numbered if origins[sample] == STUDENT])
        samples = [written[sample] if sample in written else self._given(*sample) for sample in numbered]
        self._num_samples += len(samples)
        if self._settings.save_samples and self._world.is_main:
            save_samples(self._output_dir, f"train-{step + 1}", samples, self._tokenizer)
        return make_step(to_examples(samples), self._stream_settings, self._world.data_rank, self._world.dims.data_size)

    def weights_changed(self, weights: Weights, step: int) -> None:
        self.writer.weights_changed(weights, step)

    def metrics(self) -> dict[str, float]:
        counts = self.writer.counts
        written = max(counts.completions, 1)
        found = {
            "rollout/on_policy_share": counts.completions / max(self._num_samples, 1),
            "rollout/mean_length": counts.tokens / written,
            "rollout/truncated_share": counts.truncated / written,
            "rollout/tokens_per_second": counts.tokens / counts.seconds if counts.seconds else 0.0,
            **(self._rewards.metrics() if self.scorer is not None else {}),
        }
        self.writer.counts, self._num_samples, self._rewards = WritingCounts(), 0, RewardCounts()
        return found

    def state_dict(self) -> dict[str, Any]:
        return self._prompts.position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._prompts.seek(state)

    def close(self) -> None:
        self.writer.offload()
        if self.scorer is not None:
            self.scorer.close()

    def _origin(self, step: int, row: int, number: int) -> str:
        """Who writes the answer of a sample."""
        draw = np.random.default_rng((self._seed, step, row, number)).random()
        return STUDENT if draw < self._settings.on_policy_fraction else DATASET

    def _prompt(self, row: int) -> tuple[int, ...]:
        tokens, _ = self._examples.row(row)
        return tuple(int(token) for token in tokens[: self._starts[row]])

    def _given(self, row: int, number: int) -> Sample:
        """A sample with the answer of the data."""
        return Sample(row, number, DATASET, *self._examples.row(row))

    def _write(self, step: int, samples: list[tuple[int, int]]) -> dict[tuple[int, int], Sample]:
        """The samples (row, number) with answers of the student."""
        questions = [Question(self._prompt(row), row, number) for row, number in samples]
        seed = int(np.random.default_rng((self._seed, step)).integers(2**62))
        written = self.answers.write(questions, self._examples, STUDENT, seed)
        for sample in written if self.scorer is not None else ():
            self._rewards.add(sample.reward, sample.reason)
        return dict(zip(samples, written, strict=True))

    def _check_room(self, sequence_length: int) -> None:
        longest = int(self._starts.max())
        needed = longest + self._settings.max_new_tokens
        if self._settings.on_policy_fraction > 0 and needed > sequence_length:
            raise LimbeckError(
                f"sequence_length = {sequence_length} cannot hold the longest prompt, {longest} tokens, and an answer of "
                f"rollout.max_new_tokens = {self._settings.max_new_tokens}; raise sequence_length to {needed}, or lower "
                "max_new_tokens."
            )

    def _end_tokens(self) -> set[int]:
        """The token that ends the answers of the data, if most end with the same one; a chat template may have its own."""
        count = min(len(self._examples), _CHECKED_ROWS)
        last = Counter(int(labels[labels != IGNORE][-1]) for labels in (self._examples.row(i)[1] for i in range(count)))
        token, times = last.most_common(1)[0]
        return {token} if times > count // 2 else set()
