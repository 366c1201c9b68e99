"""Writes completions with the student's current weights. Each rank writes a part, and every rank gets all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.config.schema.rollout import RolloutConfig
from limbeck.registry import GENERATORS
from limbeck.rollout import Completion, Generator, Prompt, SamplingParams
from limbeck.strategies.world import World
from limbeck.train.step_source import Weights


@dataclass
class WritingCounts:
    """What was written since the counts were last reset: completions, their tokens, those cut off, and the seconds.

    sync_seconds: of ``seconds``, those of loading new weights into the generator.
    """

    completions: int = 0
    tokens: int = 0
    truncated: int = 0
    seconds: float = 0.0
    sync_seconds: float = 0.0


class Writer:
    """The generator of a run with the student's weights.

    Args:
        config: of the run; ``config.rollout`` names the generator.
        world: the processes of the student.
        stop_token_ids: end a completion, beside the model's own end tokens.
        generator: with weights of its own; by default the generator of the configuration, without weights.
    """

    def __init__(
        self, config: DistillConfig, world: World, stop_token_ids: Sequence[int], generator: Generator | None = None
    ) -> None:
        assert config.rollout is not None
        self._world = world
        self._sampling = sampling_params(config.rollout, stop_token_ids)
        self._generator: Generator = generator or GENERATORS.get(config.rollout.generator)(config, world)
        self._weights: Weights | None = None
        self._version = 0
        self.counts = WritingCounts()

    def weights_changed(self, weights: Weights, step: int) -> None:
        """Load ``weights`` before the next completion is written."""
        self._weights, self._version = weights, step

    def write(self, prompts: Sequence[Prompt], seed: int, **changes: object) -> list[Completion]:
        """One completion for each of ``prompts``, in order. Collective: every rank gives the same prompts.

        A prompt that occurs several times gets as many independent completions.

        Args:
            prompts: to continue.
            seed: of all randomness, with the row of the prompt and the number of its completion.
            changes: replace fields of the run's ``SamplingParams``.
        """
        if not prompts:
            return []
        begun = time.perf_counter()
        if self._weights is not None:
            self._generator.update_weights(self._weights(), self._version)
            self._weights = None
            self.counts.sync_seconds += time.perf_counter() - begun
        sampling = replace(self._sampling, seed=seed, **changes)  # type: ignore[arg-type]
        wanted = Counter(prompts)
        mine = list(wanted)[self._world.data_rank :: self._world.dims.data_size]
        own: list[Completion] = []
        for count in sorted(set(wanted.values())):
            group = [prompt for prompt in mine if wanted[prompt] == count]
            own += self._generator.generate(group, replace(sampling, n=count)) if group else []
        by_prompt: dict[int, list[Completion]] = {}
        known = {prompt.row_id: prompt for prompt in wanted}
        for completion in _gather(own, known, self._world):
            by_prompt.setdefault(completion.prompt.row_id, []).append(completion)
        found = [by_prompt[prompt.row_id].pop(0) for prompt in prompts]
        self.counts.completions += len(found)
        self.counts.tokens += sum(len(completion.token_ids) for completion in found)
        self.counts.truncated += sum(not completion.finished for completion in found)
        self.counts.seconds += time.perf_counter() - begun
        return found

    def offload(self) -> None:
        """Free the device."""
        self._generator.offload()


def sampling_params(settings: RolloutConfig, stop_token_ids: Sequence[int]) -> SamplingParams:
    """How the configuration samples."""
    return SamplingParams(
        max_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop_strings=tuple(settings.stop_strings),
        stop_token_ids=tuple(stop_token_ids),
    )


def _gather(completions: list[Completion], prompts: dict[int, Prompt], world: World) -> list[Completion]:
    """The completions of all ranks, those of the first rank first. Collective."""
    if world.size == 1:
        return completions
    numbers: list[int] = []
    log_probs: list[float] = []
    for one in completions:
        numbers += [one.prompt.row_id, one.finished, one.version, len(one.token_ids), one.log_probs is not None]
        numbers += one.token_ids
        log_probs += one.log_probs or ()
    all_numbers = _gather_flat(torch.tensor(numbers, dtype=torch.int64), world)
    all_log_probs = _gather_flat(torch.tensor(log_probs, dtype=torch.float32), world)
    gathered = []
    for of_rank, values in zip(all_numbers, all_log_probs, strict=True):
        at, value_at = 0, 0
        while at < len(of_rank):
            row, finished, version, length, has_log_probs = of_rank[at : at + 5]
            tokens = tuple(of_rank[at + 5 : at + 5 + length])
            of_tokens = tuple(values[value_at : value_at + length]) if has_log_probs else None
            gathered.append(Completion(prompts[row], tokens, of_tokens, bool(finished), version))
            at += 5 + length
            value_at += length if has_log_probs else 0
    return gathered


def _gather_flat(own: Tensor, world: World) -> list[list[Any]]:
    """The values [n] of every rank, of which each may have another number. Collective."""
    own = own.to(world.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(own)], device=world.device))
    longest = max(int(size) for size in sizes)
    parts = [torch.zeros(longest, dtype=own.dtype, device=world.device) for _ in range(world.size)]
    dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))))
    return [part[: int(size)].tolist() for size, part in zip(sizes, parts, strict=True)]
