"""On-policy steps: for a share of the samples, the student writes the answer.

The others have the answer of the data or one that the teacher has written, or are earlier samples of the student.

Agarwal et al. (2024), "On-Policy Distillation of Language Models" (https://arxiv.org/abs/2306.13649), algorithm 1, with the
choice made for each sample instead of each step. Everything random depends on the seed, the step and the row only, so a run
continues exactly from a checkpoint, on any number of ranks.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.config import DistillConfig
from limbeck.config.schema.origin_objectives import weight_of_origin
from limbeck.config.schema.origins import ORIGINS
from limbeck.config.schema.schedules import AdaptiveSchedule
from limbeck.data import BatchStream
from limbeck.data.batch import StepBatch
from limbeck.data.masks import IGNORE
from limbeck.data.stream import make_step
from limbeck.data.teacher_prompts import with_teacher_prompts
from limbeck.errors import LimbeckError
from limbeck.rollout.student import num_tokens
from limbeck.strategies.world import World
from limbeck.train.adaptive_share import AdaptiveShare
from limbeck.train.answer_statistics import AnswerStatistics, EmptyAnswers, StopRule, UnseenStopStrings
from limbeck.train.answers import AnswerWriter, NumberedPrompt
from limbeck.train.build.answer_ends import disagreements, end_of_template
from limbeck.train.build.data import Data
from limbeck.train.build.objective import objective_indices
from limbeck.train.replay import ReplayBuffer
from limbeck.train.sample_files import save_samples
from limbeck.train.samples import DATASET, REPLAY, STUDENT, TEACHER, Sample, answer_starts, to_examples
from limbeck.train.scoring import RewardCounts, Scorer
from limbeck.train.step_source import Weights, count_steps
from limbeck.train.teacher_writer import TeacherWriter
from limbeck.train.write_ahead import WriteAhead, WrittenStep
from limbeck.train.writer import Writer, WritingCounts

_CHECKED_ROWS = 1000  # of which the answers' last token is looked at


class RolloutSource:
    """Steps of which the student writes the share ``rollout.on_policy_fraction``."""

    def __init__(self, config: DistillConfig, world: World, data: Data) -> None:
        assert config.rollout is not None
        self._settings, self._seed, self._world = config.rollout, config.seed, world
        self._needs_log_probs = config.has_policy_gradient
        schedule, self._objectives = config.rollout.schedule, objective_indices(config)
        self._share = AdaptiveShare(schedule) if isinstance(schedule, AdaptiveSchedule) else schedule
        self._weights = {origin: weight_of_origin(config, origin) for origin in ORIGINS}
        if isinstance(schedule, AdaptiveSchedule) and not data.validation:
            raise LimbeckError(
                f"rollout.on_policy_fraction has the shape adaptive, which follows {schedule.metric}, and no validation row "
                "has an answer, on which it is measured; give validation rows with answers, or use another shape."
            )
        self._replay = ReplayBuffer(config.rollout.replay.capacity) if config.rollout.replay.is_used else None
        self._replay_share = config.rollout.replay.schedule
        self._examples, self._stream_settings = data.examples, data.stream_settings
        prompts = replace(
            data.stream_settings,
            per_device_batch_size=prompts_per_step(config, world),
            accumulation_steps=1,
            packing=False,
            group_by_length=False,
            max_tokens_per_microbatch=0,
        )
        self._prompts = BatchStream(data.examples, prompts)
        self.steps_per_epoch: int | None = self._prompts.steps_per_epoch
        self._total_steps = count_steps(config, self)
        self._starts = answer_starts(data.examples)
        self._check_room(config.sequence_length)
        size = num_tokens(data.tokenizer)
        for token in self._settings.stop_token_ids:
            if not 0 <= token < size:
                raise LimbeckError(
                    f"rollout.stop_token_ids has {token}, which is no token of {config.tokenizer_name_or_path}, whose ids "
                    f"end at {size - 1}; correct it."
                )
        (ends, has_answers), origins = self._end_tokens(config, data.tokenizer), self._settings.origins
        stops = sorted({*self._settings.stop_token_ids, *ends})
        self.writer = Writer(config, world, stops)
        self._teacher = TeacherWriter(config, world, data.tokenizer, stops) if TEACHER in origins else None
        if world.is_main and {STUDENT, TEACHER} & set(origins):
            for sentence in disagreements(config, data.tokenizer, ends, has_answers):
                warnings.warn(sentence, stacklevel=2)
        staleness = self._settings.max_staleness
        # The newest step is being written while this one is trained, so a teacher can have one step less in advance.
        self.max_lookahead = max(0, staleness - 1)
        block = self._settings.steps_per_rollout
        self._ahead = WriteAhead(self._begin, lambda: self._prompts.position, staleness, self._total_steps, block)
        self._version = 0  # of the student's weights
        self._made: deque[WrittenStep] = deque()  # steps that are not trained yet
        self._counts: Counter[str] = Counter()  # of the samples by origin
        self._statistics = AnswerStatistics()
        self._stop_rule = StopRule(self._settings.stop_if)
        self._unseen = UnseenStopStrings(self._settings.stop_strings if world.is_main else (), data.tokenizer)
        self._empty = EmptyAnswers(warns=world.is_main)
        self._staleness: list[int] = []  # of each step
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
        taken = self._ahead.take(step, self._version)
        self._made.append(taken)
        examples = to_examples(taken.samples, self._objectives, self._weights, self._settings.reward_weight)
        if self._examples.teacher_prompts is not None:
            examples = with_teacher_prompts(examples, self._examples)
        made = make_step(examples, self._stream_settings, self._world.data_rank, self._world.dims.data_size)
        if taken.version == step:
            return made
        return replace(made, micro_batches=tuple(replace(batch, is_stale=True) for batch in made.micro_batches))

    def before_update(self) -> None:
        self._ahead.finish()  # a failure now loses no step
        self._stop_rule.check(self._version)
        self._count(self._made.popleft())  # now, because a step may be made while an earlier one is trained

    def weights_changed(self, weights: Weights, step: int) -> None:
        self._ahead.finish()  # with the weights before these
        self.writer.weights_changed(weights, step)
        self._version = step
        if self._settings.max_staleness:
            self._ahead.fill(step)

    def validated(self, metrics: Mapping[str, float]) -> None:
        if isinstance(self._share, AdaptiveShare):
            self._share.validated(metrics)

    def metrics(self) -> dict[str, float]:
        counts, steps, origins = self.writer.counts, max(len(self._staleness), 1), self._settings.origins
        total = max(self._counts.total(), 1)
        found = {
            "rollout/on_policy_share": self._counts[STUDENT] / total,
            **{f"rollout/{name}_share": self._counts[name] / total for name in (TEACHER, REPLAY) if name in origins},
            **({"rollout/adaptive_share": self._share.at(0, 1)} if isinstance(self._share, AdaptiveShare) else {}),
            **(self._statistics.metrics() if STUDENT in origins else {}),
            "rollout/staleness": sum(self._staleness) / steps,
            "rollout/tokens_per_second": counts.tokens / counts.seconds if counts.seconds else 0.0,
            "time/rollout": counts.waited_seconds / steps,
            "time/weight_sync": counts.sync_seconds / steps,
            **(self._rewards.metrics() if self.scorer is not None else {}),
        }
        self.writer.counts, self._statistics = WritingCounts(), AnswerStatistics()
        self._counts, self._staleness, self._rewards = Counter(), [], RewardCounts()
        return found

    def state_dict(self) -> Mapping[str, Any]:
        state = self._ahead.state_dict()
        if self._replay is not None:
            state = {**state, "replay": self._replay.state()}
        if isinstance(self._share, AdaptiveShare):
            state = {**state, "share": self._share.state()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._prompts.seek(self._ahead.load_state_dict(state))
        if self._replay is not None:
            self._replay.load(state.get("replay", ()))
        if isinstance(self._share, AdaptiveShare) and "share" in state:
            self._share.load(state["share"])

    def close(self) -> None:
        self.writer.close()
        if self._teacher is not None:
            self._teacher.close()
        if self.scorer is not None:
            self.scorer.close()
        self._unseen.report()

    def _count(self, trained: WrittenStep) -> None:
        """Add the step that is being trained to the metrics."""
        samples = trained.samples
        answers = [sample for sample in samples if sample.origin == STUDENT]
        self._stop_rule.add(answers)
        self._unseen.add(answers)
        self._empty.add([sample for sample in samples if sample.origin in (STUDENT, TEACHER)], trained.step)
        self._statistics.add(answers)
        self._counts.update(sample.origin for sample in samples)
        self._staleness.append(trained.step - trained.version)
        for sample in answers if self.scorer is not None else ():
            self._rewards.add(sample.reward, sample.reason)
        if self._settings.save_samples and self._world.is_main:
            save_samples(self._output_dir, f"train-{trained.step + 1}", samples, self._tokenizer)

    def _begin(self, step: int) -> Callable[[], list[Sample]]:
        """Take the next prompts and begin to write; returns the function that waits for the samples. Both are collective."""
        numbered = number_samples([int(unit[0]) for unit in self._prompts.take()], self._settings.num_generations)
        origins = {sample: self._origin(step, *sample) for sample in numbered}
        finish = self._write(step, [sample for sample in numbered if origins[sample] == STUDENT])
        of_teacher: dict[tuple[int, int], Sample] = {}
        if self._teacher is not None:
            theirs = [sample for sample in numbered if origins[sample] == TEACHER]
            of_teacher = self._teacher.write(theirs, self._prompt, self._weight)

        def finish_step() -> list[Sample]:
            written = finish()
            found = written | of_teacher
            if self._replay is not None:
                replayed = (sample for sample in numbered if origins[sample] == REPLAY)
                found |= {sample: self._replay.pick(self._draws(step, *sample)[2]) for sample in replayed}
                self._replay.add(written.values())
            return [found[sample] if sample in found else self._given(*sample) for sample in numbered]

        return finish_step

    def _draws(self, step: int, row: int, number: int) -> NDArray[np.float64]:
        """[3] random numbers of a sample: whether the student writes it, whether it is replayed, and which one is."""
        return np.random.default_rng((self._seed, step, row, number)).random(3)

    def _origin(self, step: int, row: int, number: int) -> str:
        """Who writes the answer of a sample. Nothing is replayed before the student has written something."""
        on_policy, replayed, _ = self._draws(step, row, number)
        replays = self._replay is not None and replayed < self._replay_share.at(step, self._total_steps)
        if on_policy < self._share.at(step, self._total_steps):
            full = self._replay is not None and self._replay.is_full
            return REPLAY if replays and full and self._settings.replay.replaces == "student" else STUDENT
        replays = replays and bool(self._replay) and self._settings.replay.replaces == "off_policy"
        return REPLAY if replays else self._settings.off_policy

    def _prompt(self, row: int) -> tuple[int, ...]:
        tokens, _ = self._examples.row(row)
        return tuple(int(token) for token in tokens[: self._starts[row]])

    def _given(self, row: int, number: int) -> Sample:
        """A sample with the answer of the data."""
        weights = self._examples.weights
        if weights is not None:
            weights = weights[self._examples.offsets[row] : self._examples.offsets[row + 1]]
        return Sample(row, number, DATASET, *self._examples.row(row), weights=weights)

    def _weight(self, row: int) -> float:
        """The factor of the loss of an answer that replaces that of the data; 1 for a row without one."""
        weights, start = self._examples.weights, int(self._starts[row])
        if weights is None or start == self._examples.lengths[row]:
            return 1.0
        return float(weights[self._examples.offsets[row] + start - 1])

    def _write(self, step: int, samples: list[tuple[int, int]]) -> Callable[[], dict[tuple[int, int], Sample]]:
        """Begin to write the samples (row, number); returns the function that waits for them, with answers of the student."""
        prompts = [NumberedPrompt(self._prompt(row), row, number, self._weight(row)) for row, number in samples]
        seed = int(np.random.default_rng((self._seed, step)).integers(2**62))
        finish = self.answers.begin(prompts, self._examples, STUDENT, seed)

        def finish_samples() -> dict[tuple[int, int], Sample]:
            written = finish()
            if self._needs_log_probs and any(one.log_probs is None for one in written):
                raise LimbeckError(
                    f"rollout.generator = {self._settings.generator} gives no log-probabilities of what it writes, which a "
                    "policy gradient needs; use another generator, or a divergence as kd_objective and "
                    "rollout.reward_weight: 0."
                )
            return dict(zip(samples, written, strict=True))

        return finish_samples

    def _check_room(self, sequence_length: int) -> None:
        """Answers end at ``sequence_length``. Raises LimbeckError if a prompt leaves no room for one."""
        longest, wanted = int(self._starts.max()), self._settings.max_new_tokens
        if not {STUDENT, TEACHER} & set(self._settings.origins):
            return
        if longest >= sequence_length:
            raise LimbeckError(
                f"sequence_length = {sequence_length} leaves no room for an answer to the longest prompt, {longest} tokens; "
                "raise it, or remove longer prompts."
            )
        if self._world.is_main and longest + wanted > sequence_length:
            warnings.warn(
                f"The longest prompt has {longest} tokens, so that sequence_length = {sequence_length} leaves its answer "
                f"{sequence_length - longest} of rollout.max_new_tokens = {wanted}; longer answers are cut off.",
                stacklevel=2,
            )

    def _end_tokens(self, config: DistillConfig, tokenizer: Any) -> tuple[set[int], bool]:
        """The token that ends the answers of the data, if most end with the same one, and whether there are answers.

        A chat template may have its own, which is used where no row has an answer. Rows as long as ``sequence_length`` may
        have been cut and show no end.
        """
        count = min(len(self._examples), _CHECKED_ROWS)
        supervised = [labels[labels != IGNORE] for labels in (self._examples.row(row)[1] for row in range(count))]
        if not any(len(labels) for labels in supervised):
            return end_of_template(config, tokenizer), False
        whole = self._examples.lengths[:count] < config.sequence_length
        last = Counter(
            int(labels[-1]) for labels, is_whole in zip(supervised, whole, strict=True) if is_whole and len(labels)
        )
        return {token for token, times in last.items() if times > last.total() // 2}, bool(last)


def number_samples(rows: Sequence[int], num_generations: int) -> list[tuple[int, int]]:
    """(row, number) of each sample of a step, ``num_generations`` for each of ``rows``. A row that occurs again in the step,
    as in a mixture that repeats a small source, continues its numbers, so that each of its samples is another one.
    """
    counts: Counter[int] = Counter()
    numbered = []
    for row in rows:
        numbered += [(row, counts[row] + number) for number in range(num_generations)]
        counts[row] += num_generations
    return numbered


def prompts_per_step(config: DistillConfig, world: World) -> int:
    """Number of prompts of a step, on all ranks together. Raises LimbeckError if their samples do not fill it."""
    assert config.rollout is not None
    training, each = config.student.training_args, config.rollout.num_generations
    samples = training.per_device_train_batch_size * training.gradient_accumulation_steps * world.dims.data_size
    if samples % each:
        raise LimbeckError(
            f"rollout.num_generations = {each} does not divide the {samples} samples of a step "
            "(per_device_train_batch_size x gradient_accumulation_steps x ranks); change one of them."
        )
    return samples // each
