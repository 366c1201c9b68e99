"""Where optimizer steps come from: the protocol, and the stream over a dataset.

A source yields this rank's micro-batches. It may make them from a dataset, let the student write them, or mix both; the
loop does not know. Sources are registered in ``limbeck.registry.STEP_SOURCES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.data import BatchStream, PrefetchedStream
from limbeck.data.batch import StepBatch
from limbeck.errors import LimbeckError
from limbeck.strategies.base import Engine
from limbeck.strategies.world import World
from limbeck.train.build.data import Data


@dataclass(frozen=True)
class Weights:
    """The student's current weights. A call iterates over their names in the plain model and full tensors, one at a time.
    Collective.

    engine: that trains them, for what uses the student in place.
    """

    iterate: Callable[[], Iterator[tuple[str, Tensor]]]
    engine: Engine

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        return self.iterate()


class StepSource(Protocol):
    """Yields optimizer steps. Every rank calls every method in the same order."""

    max_lookahead: int
    """Steps that may be made, and requested from the teacher, before earlier ones are trained; 0 if a step depends on
    the weights.
    """

    steps_per_epoch: int | None
    """Steps in one pass over the data; None if there are no epochs."""

    def next(self, step: int) -> StepBatch:
        """This rank's micro-batches of optimizer step ``step`` (from 0), on the host, with the counts of this rank.

        Raises:
            StopTraining: to end the run after a checkpoint; on every rank, and before the state is changed.
            WritingError: if a generator failed, or an environment returned no steps; on every rank. The run ends with a
                checkpoint of the last completed step.
        """

    def before_update(self) -> None:
        """The next step in order has its gradients, and the optimizer changes the weights now. Wait for what uses them beside
        the training step. Raises as ``next``.
        """

    def weights_changed(self, weights: Weights, step: int) -> None:
        """The student has taken step ``step``, or is about to begin after it; ``weights()`` iterates over its current
        weights, if the source needs them.
        """

    def validated(self, metrics: Mapping[str, float]) -> None:
        """The student has been validated with these results, before the next step is made; the same on every rank."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the steps that were trained since the previous call, which are added to a log line; those that are not
        finite are left out. Those that begin with ``time/`` are seconds per step, which the line takes from ``time/data``.
        """

    def state_dict(self) -> Mapping[str, Any]:
        """JSON values from which the next step can be made again, on any number of ranks."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was called."""

    def close(self) -> None:
        """End background work."""


def count_steps(config: DistillConfig, source: StepSource) -> int:
    """Number of optimizer steps of the whole run.

    Raises:
        LimbeckError: if only epochs limit the run, and ``source`` has none.
    """
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.num_train_epochs is not None:
        if source.steps_per_epoch is None:
            raise LimbeckError(f"step_source = {config.effective_step_source} has no epochs; set max_steps.")
        limits.append(ceil(config.num_train_epochs * source.steps_per_epoch))
    return min(limits)


class DatasetSource:
    """Off-policy steps: rows of the dataset in an order that depends on seed and epoch only."""

    max_lookahead = 1

    def __init__(self, config: DistillConfig, world: World, data: Data) -> None:
        self._stream = PrefetchedStream(
            BatchStream(data.examples, data.stream_settings, world.data_rank, world.dims.data_size), device=world.device
        )
        self.steps_per_epoch: int | None = self._stream.steps_per_epoch

    def next(self, step: int) -> StepBatch:
        return next(self._stream)

    def before_update(self) -> None:
        """Nothing uses the weights."""

    def weights_changed(self, weights: Weights, step: int) -> None:
        """A dataset does not depend on the weights."""

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Nor on how good they are."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return self._stream.position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.seek(state)

    def close(self) -> None:
        self._stream.close()
