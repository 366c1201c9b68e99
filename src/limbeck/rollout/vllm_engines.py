"""The generator ``vllm`` of a run: one engine in every process, or engines on ``rollout.device_mapping``.

The number of engines with devices of their own does not depend on the number of the student's ranks. Engine e belongs to
rank e modulo the number of ranks, which sends it weights and prompts; a rank may have several engines, or none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.rollout.generator import Completion, Generator, Prompt, SamplingParams
from limbeck.rollout.student import student_outline
from limbeck.rollout.vllm import VllmGenerator
from limbeck.rollout.vllm_process import SeparateVllm
from limbeck.strategies.world import World


class VllmEngines:
    """The engines of this rank, as one generator.

    writer_ranks: the rank of each engine of the run. ``Writer`` gives the prompts to these in turn.
    """

    def __init__(self, engines: Sequence[SeparateVllm], writer_ranks: Sequence[int]) -> None:
        self._engines, self.writer_ranks = list(engines), tuple(writer_ranks)
        self._threads = ThreadPoolExecutor(max(1, len(engines)), "vllm")

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """See ``Generator``. The engines write at the same time, each its part of the prompts."""
        count, n = len(self._engines), sampling.n
        parts = [prompts[number::count] for number in range(count)]
        written = list(self._threads.map(lambda engine, part: engine.generate(part, sampling), self._engines, parts))
        of_prompts = (written[at % count][at // count * n : (at // count + 1) * n] for at in range(len(prompts)))
        return [completion for of_prompt in of_prompts for completion in of_prompt]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``Generator``. A rank without engines only takes part in gathering the weights."""
        if not self._engines:
            for _ in weights:
                pass
            return
        with ExitStack() as updates:
            senders = [updates.enter_context(engine.updating(version)) for engine in self._engines]
            for part in self._engines[0].parts(weights):
                for send in senders:
                    send(part)

    def offload(self) -> None:
        """Does nothing: the engines have devices of their own."""

    def reload(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """End the processes of the engines."""
        self._threads.shutdown()
        for engine in self._engines:
            engine.close()


def make_generator(config: DistillConfig, world: World) -> Generator:
    """The generator of a run's student, without weights; ``rollout.generator_kwargs`` are arguments of ``vllm.LLM``."""
    arguments = config.rollout.generator_kwargs if config.rollout else {}
    mapping = config.rollout.device_mapping if config.rollout else None
    outline = student_outline(config, world)
    trusts = config.student.model_args.trust_remote_code
    length, device = config.sequence_length, world.device.type
    if mapping is None:
        return VllmGenerator(*outline, length, device, world.size, arguments, trusts)
    size = int(arguments.get("tensor_parallel_size", 1))
    engines = len(mapping) // size
    own = range(world.rank, engines, world.size)
    # The visible devices are first those of the student's processes that see them, then those of their engines.
    students = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    first = [students + size * (engine if students == world.size else number) for number, engine in enumerate(own)]
    return VllmEngines(
        [SeparateVllm(*outline, length, range(at, at + size), device, arguments, trusts) for at in first],
        [engine % world.size for engine in range(engines)],
    )
