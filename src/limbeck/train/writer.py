"""Writes completions with the student's current weights. Each rank writes a part, and every rank gets all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from traceback import clear_frames, extract_tb
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.config.schema.rollout import RolloutConfig
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, model_limits
from limbeck.registry import GENERATORS
from limbeck.rollout import Completion, Generator, InPlaceGenerator, Prompt, SamplingParams
from limbeck.strategies.world import World
from limbeck.train.gather import agree
from limbeck.train.step_source import Weights

_LESS_TO_WRITE = (
    "Lower rollout.max_new_tokens or the number of answers that are written at a time (slots or max_num_seqs in "
    "rollout.generator_kwargs), set rollout.offload: true, or use devices with more memory."
)


@dataclass
class WritingCounts:
    """What was written since the counts were last reset, and the seconds that this took.

    seconds: of writing. waited_seconds: in which the caller did nothing else. sync_seconds: of loading new weights into the
    generator.
    """

    completions: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    sync_seconds: float = 0.0


class Writer:
    """The generator of a run with the student's weights.

    With ``rollout.max_staleness`` a thread writes. It runs the generator only: weights are loaded and completions gathered by
    the caller, so that all ranks run their collectives in the same order.

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
        self._name = (
            f"rollout.generator = {config.rollout.generator}" if generator is None else type(generator).__name__
        )
        with self._explained("could not be made"):
            self._generator: Generator = generator or GENERATORS.get(config.rollout.generator)(config, world)
        _, self._num_tokens = model_limits(ModelSource.from_args(config.student.model_args, "student"))
        # A generator with other engines than one on every rank names the rank of each.
        self._writer_ranks: Sequence[int] = getattr(self._generator, "writer_ranks", range(world.size))
        self._offloads = config.offloads_colocated or config.rollout.offload
        self._weights: Weights | None = None
        self._version = 0
        self._failure: LimbeckError | None = None  # of loading the weights that write
        self._thread = ThreadPoolExecutor(1, "writer") if config.rollout.max_staleness else None
        self._stream = torch.cuda.Stream(world.device) if self._thread and world.device.type == "cuda" else None
        self.counts = WritingCounts()

    def weights_changed(self, weights: Weights, step: int) -> None:
        """Load ``weights`` before the next completion is written; with a thread now, and then nothing may be being written."""
        self._weights, self._version = weights, step
        if self._thread is not None:
            self._load()

    def write(self, prompts: Sequence[Prompt], seed: int, **changes: object) -> list[Completion]:
        """One completion for each of ``prompts``, in order. Collective: every rank gives the same prompts.

        A prompt that occurs several times gets as many independent completions.

        Args:
            prompts: to continue.
            seed: of all randomness, with the row of the prompt and the number of its completion.
            changes: replace fields of the run's ``SamplingParams``.
        """
        return self.begin(prompts, seed, **changes)()

    def begin(self, prompts: Sequence[Prompt], seed: int, **changes: object) -> Callable[[], list[Completion]]:
        """The same, in two parts: the function that is returned waits for the completions. Both are collective."""
        if not prompts:
            return list
        self._load()
        wanted = Counter(prompts)
        sampling = replace(self._sampling, seed=seed, **changes)  # type: ignore[arg-type]
        writers = len(self._writer_ranks)
        mine = [prompt for at, prompt in enumerate(wanted) if self._writer_ranks[at % writers] == self._world.rank]
        # Generators are called equally often on every rank, also with no prompts: they may run their passes together.
        groups = [
            (count, [prompt for prompt in mine if wanted[prompt] == count]) for count in sorted({*wanted.values()})
        ]
        generate = partial(self._generate, groups, sampling)
        if self._thread is not None:
            return partial(self._finish, prompts, self._thread.submit(generate).result)
        return partial(self._finish, prompts, generate)

    def close(self) -> None:
        """Wait for what is being written, and free the device; a generator with processes of its own ends them."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        getattr(self._generator, "close", self._generator.offload)()

    def _load(self) -> None:
        """Make the generator ready with the newest weights.

        A failure ends the writing that follows, like one of the generator itself: there all ranks learn of it, and the step
        before is complete.
        """
        if self._offloads:
            with self._postponed("could not be reloaded"):
                self._generator.reload()
        if self._weights is None:
            return
        if isinstance(self._generator, InPlaceGenerator):
            self._generator.use_student(self._weights.engine, self._version)
            self._weights = None
            return
        begun, weights = time.perf_counter(), self._weights()
        loaded: Iterable[tuple[str, Tensor]] = weights
        if self._thread is not None:  # the generator may use tensors as they are, and the optimizer will change them
            loaded = ((name, tensor.detach().clone()) for name, tensor in weights)
        with self._postponed(f"could not load the weights of step {self._version}"):
            self._generator.update_weights(loaded, self._version)
        if self._failure is not None:
            for _ in weights:  # the other ranks gather the rest
                pass
        self._weights = None
        if self._stream is not None:
            torch.cuda.current_stream().synchronize()  # the thread's stream does not wait for this one
        self.counts.sync_seconds += time.perf_counter() - begun

    def _generate(
        self, groups: Sequence[tuple[int, list[Prompt]]], sampling: SamplingParams
    ) -> tuple[list[Completion], float]:
        """Completions of ``groups``, each with their number per prompt and its prompts, and the seconds that they took."""
        if self._failure is not None:
            raise self._failure
        begun = time.perf_counter()
        own: list[Completion] = []
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for count, prompts in groups:
                with self._explained("failed while it wrote"):
                    written = self._generator.generate(prompts, replace(sampling, n=count))
                    fault = fault_of(written, prompts, count, sampling.max_tokens, self._num_tokens)
                if fault:
                    raise LimbeckError(f"{self._name} returned {fault}; correct the generator.")
                own += written
        if self._offloads:
            with self._explained("could not be offloaded"):
                self._generator.offload()
        return own, time.perf_counter() - begun

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns any exception of the generator, which may be a plug-in, into one sentence."""
        try:
            yield
        except LimbeckError:
            raise
        except (Exception, SystemExit) as error:
            frames = extract_tb(error.__traceback__)
            place = next((frame for frame in frames if frame.filename != __file__), frames[-1])
            reason = " ".join(str(error).split()) or "no message"
            sentence = f"{self._name} {what}: {type(error).__name__}: {reason} ({place.filename}:{place.lineno})."
            if isinstance(error, torch.OutOfMemoryError):
                clear_frames(error.__traceback__)  # what they hold takes the memory in which the run saves
                sentence += f" {_LESS_TO_WRITE}"
            raise LimbeckError(sentence) from error

    @contextmanager
    def _postponed(self, what: str) -> Iterator[None]:
        """Keeps the sentence of an exception for the next writing."""
        try:
            with self._explained(what):
                yield
        except LimbeckError as error:
            self._failure = self._failure or error

    def _finish(
        self, prompts: Sequence[Prompt], generate: Callable[[], tuple[list[Completion], float]]
    ) -> list[Completion]:
        begun = time.perf_counter()
        own, seconds = agree(generate, self._world)
        by_prompt: dict[int, list[Completion]] = {}
        known = {prompt.row_id: prompt for prompt in prompts}
        for completion in _gather(own, known, self._world):
            by_prompt.setdefault(completion.prompt.row_id, []).append(completion)
        found = [by_prompt[prompt.row_id].pop(0) for prompt in prompts]
        self.counts.completions += len(found)
        self.counts.tokens += sum(len(completion.token_ids) for completion in found)
        self.counts.seconds += seconds
        self.counts.waited_seconds += time.perf_counter() - begun
        return found


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


def fault_of(
    completions: Sequence[Completion], prompts: Sequence[Prompt], count: int, max_tokens: int, num_tokens: int | None
) -> str | None:
    """What is wrong with what a generator returned, or None.

    Args:
        completions: that it returned.
        prompts: that it was given.
        count: of the completions of each prompt.
        max_tokens: of a completion.
        num_tokens: number of the student's token ids; None if they are not limited.
    """
    if not isinstance(completions, Sequence):
        return f"a {type(completions).__name__} in place of a list of limbeck.rollout.Completion"
    given, missing = {prompt.row_id: prompt for prompt in prompts}, {prompt.row_id: count for prompt in prompts}
    for one in completions:
        if not isinstance(one, Completion):
            return f"a {type(one).__name__} in place of a limbeck.rollout.Completion"
        row, tokens = one.prompt.row_id, one.token_ids
        if one.prompt != given.get(row):
            return f"a completion of a prompt that it was not given (row {row})"
        missing[row] -= 1
        if len(tokens) > max_tokens:
            return f"{len(tokens)} tokens for the prompt of row {row}, more than max_tokens = {max_tokens}"
        if tokens and (min(tokens) < 0 or (num_tokens is not None and max(tokens) >= num_tokens)):
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            return f"the token id {wrong} for the prompt of row {row}, which the student does not have"
        if one.log_probs is not None and len(one.log_probs) != len(tokens):
            return f"{len(one.log_probs)} log-probabilities of {len(tokens)} tokens for the prompt of row {row}"
    for row, number in missing.items():
        if number:
            return f"{count - number} completions of the prompt of row {row} in place of {count}"
    return None


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
