"""On-policy steps: for a share of the samples, the student writes the answer; the others have the answer of the data.

Agarwal et al. (2024), "On-Policy Distillation of Language Models" (https://arxiv.org/abs/2306.13649), algorithm 1, with the
choice made for each sample instead of each step. Everything random depends on the seed, the step and the row only, so a run
continues exactly from a checkpoint, on any number of ranks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from limbeck.config import DistillConfig
from limbeck.data import BatchStream
from limbeck.data.batch import StepBatch
from limbeck.data.examples import Examples
from limbeck.data.masks import IGNORE
from limbeck.data.stream import make_step
from limbeck.errors import LimbeckError
from limbeck.registry import GENERATORS
from limbeck.rollout import Generator, Prompt, SamplingParams
from limbeck.strategies.world import World
from limbeck.train.build.data import Data
from limbeck.train.step_source import Weights

Sample = tuple[int, int]
"""A row of the data, and the number of the sample among those of its prompt."""

_BLOCK = 1 << 16  # rows
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
        self._stops = tuple({*self._settings.stop_token_ids, *self._end_tokens()})
        self._generator: Generator = GENERATORS.get(self._settings.generator)(config, world)
        self._weights: Weights | None = None
        self._version = 0
        self._begin()

    def next(self, step: int) -> StepBatch:
        rows = [int(unit[0]) for unit in self._prompts.take()]
        samples = [(row, number) for row in rows for number in range(self._settings.num_generations)]
        own = [sample for sample in samples if self._is_on_policy(step, *sample)]
        written = self._write(step, own)
        texts = [written.get(sample) or self._given(sample[0]) for sample in samples]
        self._counts["samples"] += len(samples)
        return make_step(
            _to_examples([row for row, _ in samples], texts),
            self._stream_settings,
            self._world.data_rank,
            self._world.dims.data_size,
        )

    def weights_changed(self, weights: Weights, step: int) -> None:
        self._weights, self._version = weights, step

    def metrics(self) -> dict[str, float]:
        counts, written = self._counts, max(self._counts["written"], 1)
        found = {
            "rollout/on_policy_share": counts["written"] / max(counts["samples"], 1),
            "rollout/mean_length": counts["tokens"] / written,
            "rollout/truncated_share": counts["truncated"] / written,
            "rollout/tokens_per_second": counts["tokens"] / self._seconds if self._seconds else 0.0,
        }
        self._begin()
        return found

    def state_dict(self) -> dict[str, Any]:
        return self._prompts.position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._prompts.seek(state)

    def close(self) -> None:
        self._generator.offload()

    def _begin(self) -> None:
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0

    def _is_on_policy(self, step: int, row: int, number: int) -> bool:
        draw = np.random.default_rng((self._seed, step, row, number)).random()
        return bool(draw < self._settings.on_policy_fraction)

    def _prompt(self, row: int) -> tuple[int, ...]:
        tokens, _ = self._examples.row(row)
        return tuple(int(token) for token in tokens[: self._starts[row]])

    def _given(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens and labels of a row of the data."""
        return self._examples.row(row)

    def _write(self, step: int, samples: Sequence[Sample]) -> dict[Sample, tuple[Any, Any]]:
        """Tokens and labels of the samples, written by the student. Each rank writes a part, and every rank gets all."""
        if not samples:
            return {}
        begun = time.perf_counter()
        if self._weights is not None:
            self._generator.update_weights(self._weights(), self._version)
            self._weights = None
        world, settings = self._world, self._settings
        wanted = Counter(row for row, _ in samples)
        seed = int(np.random.default_rng((self._seed, step)).integers(2**62))
        sampling = SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=seed,
            stop_strings=tuple(settings.stop_strings),
            stop_token_ids=self._stops,
        )
        mine = list(wanted)[world.data_rank :: world.dims.data_size]
        answers: list[tuple[int, bool, tuple[int, ...]]] = []
        for count in sorted(set(wanted.values())):
            prompts = [Prompt(self._prompt(row), row) for row in mine if wanted[row] == count]
            written = self._generator.generate(prompts, replace(sampling, n=count)) if prompts else []
            answers += [(each.prompt.row_id, each.finished, each.token_ids) for each in written]
        by_row: dict[int, list[tuple[bool, tuple[int, ...]]]] = {}
        for row, finished, tokens in _gather(answers, world):
            by_row.setdefault(row, []).append((finished, tokens))
        found = {}
        for row, number in samples:
            finished, tokens = by_row[row].pop(0)
            found[row, number] = _as_row(self._prompt(row), tokens)
            self._counts["written"] += 1
            self._counts["tokens"] += len(tokens)
            self._counts["truncated"] += not finished
        self._seconds += time.perf_counter() - begun
        return found

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


def answer_starts(examples: Examples) -> NDArray[np.int64]:
    """[rows] number of tokens before the last answer of each row, which is what the student would write."""
    starts = np.empty(len(examples), dtype=np.int64)
    for low in range(0, len(examples), _BLOCK):  # the arrays may be mapped from files larger than memory
        offsets = examples.offsets[low : low + _BLOCK + 1]
        begin = offsets[0]
        supervised = np.asarray(examples.labels[begin : offsets[-1]]) != IGNORE
        before = np.concatenate([[False], supervised[:-1]])
        before[offsets[:-1] - begin] = False
        position = np.arange(len(supervised)) - np.repeat(offsets[:-1] - begin, np.diff(offsets))
        first = np.where(supervised & ~before, position, -1)
        starts[low : low + _BLOCK] = np.maximum.reduceat(first, offsets[:-1] - begin) + 1
    return starts


def _as_row(prompt: tuple[int, ...], answer: tuple[int, ...]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    tokens = np.array([*prompt, *answer], dtype=np.int32)
    labels = np.full(len(tokens), IGNORE, dtype=np.int32)
    labels[len(prompt) - 1 : -1] = answer
    return tokens, labels


def _to_examples(rows: Sequence[int], texts: Sequence[tuple[Any, Any]]) -> Examples:
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens, _ in texts])]).astype(np.int64)
    tokens, labels = (np.concatenate([text[i] for text in texts]).astype(np.int32) for i in (0, 1))
    return Examples(tokens, labels, offsets, row_ids=np.array(rows, dtype=np.int64))


def _gather(answers: list[tuple[int, bool, tuple[int, ...]]], world: World) -> list[tuple[int, bool, tuple[int, ...]]]:
    """The answers of all ranks, those of the first rank first. Collective."""
    if world.size == 1:
        return answers
    flat = [number for row, finished, tokens in answers for number in (row, int(finished), len(tokens), *tokens)]
    own = torch.tensor(flat, dtype=torch.int64, device=world.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(flat)], device=world.device))
    longest = max(int(size) for size in sizes)
    parts = [torch.zeros(longest, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))))
    gathered = []
    for size, part in zip(sizes, parts, strict=True):
        numbers = part[: int(size)].tolist()
        at = 0
        while at < len(numbers):
            row, finished, length = numbers[at : at + 3]
            gathered.append((row, bool(finished), tuple(numbers[at + 3 : at + 3 + length])))
            at += 3 + length
    return gathered
