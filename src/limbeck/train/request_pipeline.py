"""Sends the teacher the next step's requests before this step is trained, so that a teacher elsewhere computes
meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, NamedTuple

from limbeck.data.batch import Batch, StepBatch
from limbeck.teachers.protocol import SignalFuture
from limbeck.train.step_source import StepSource

Request = Callable[[Batch], SignalFuture | None]


class RequestedStep(NamedTuple):
    """One optimizer step, with the future signal of each of its micro-batches; None where no signal is needed."""

    batch: StepBatch
    signals: tuple[SignalFuture | None, ...]


class RequestPipeline:
    """The steps of ``source``, requested from the teacher up to ``source.max_lookahead`` steps ahead.

    Every rank prepares and requests the same steps at the same moments, so that collectives match.

    Args:
        source: makes the steps.
        prepare: finishes a step (counts, teacher tokens); may be collective.
        request: sends one micro-batch to the teacher.
        teacher_turn: with a colocated teacher that is offloaded while the student trains: the context in which it can
            compute. Then ``offload_interval`` steps are requested in one context.
    """

    def __init__(
        self,
        source: StepSource,
        prepare: Callable[[StepBatch], StepBatch],
        request: Request,
        teacher_turn: Callable[[], AbstractContextManager[None]] | None = None,
        offload_interval: int = 1,
    ) -> None:
        self._source, self._prepare, self._request = source, prepare, request
        self._teacher_turn, self._interval = teacher_turn, offload_interval
        self._pending: deque[tuple[Mapping[str, Any], RequestedStep]] = deque()

    def state_dict(self) -> Mapping[str, Any]:
        """The source's state at the step that is taken next, though it may have been requested already."""
        return self._pending[0][0] if self._pending else self._source.state_dict()

    def take(self, step: int, remaining: int) -> RequestedStep:
        """Step number ``step``, of which ``remaining`` are left with it."""
        if self._teacher_turn is None:
            for number in range(len(self._pending), min(1 + min(1, self._source.max_lookahead), remaining)):
                self._send(*self._make(step + number))
        elif not self._pending:
            steps = min(self._interval if self._source.max_lookahead else 1, remaining)
            made = [
                self._make(step + number) for number in range(steps)
            ]  # the student, which may write them, is still there
            with self._teacher_turn():
                for state, batch in made:
                    self._send(state, batch)
        return self._pending.popleft()[1]

    def _make(self, step: int) -> tuple[Mapping[str, Any], StepBatch]:
        """Step number ``step``, and the source's state before it."""
        state = self._source.state_dict()
        return state, self._prepare(self._source.next(step))

    def _send(self, state: Mapping[str, Any], batch: StepBatch) -> None:
        self._pending.append((state, RequestedStep(batch, tuple(map(self._request, batch.micro_batches)))))


def prefetch_requests(batches: Iterable[Batch], request: Request) -> Iterator[tuple[Batch, SignalFuture | None]]:
    """Each batch with its future signal, the following batch already requested."""
    waiting: tuple[Batch, SignalFuture | None] | None = None
    for batch in chain(batches, (None,)):
        requested = None if batch is None else (batch, request(batch))
        if waiting is not None:
            yield waiting
        waiting = requested
