"""The next step's questions are put to the teacher before this step is trained, so that a teacher elsewhere works meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import NamedTuple

from limbeck.data import PrefetchedStream
from limbeck.data.batch import Batch, StepBatch
from limbeck.teachers import SignalFuture


class RequestedStep(NamedTuple):
    """One optimizer step with an answer to come for each of its micro-batches; None where nobody was asked."""

    batch: StepBatch
    answers: tuple[SignalFuture | None, ...]


class RequestPipeline:
    """The steps of ``stream``, each made ready by ``prepare`` and asked about with ``ask`` one step ahead of its turn.

    Every rank looks ahead at the same moments, so that what they must do together they do together. With a ``turn``, a teacher
    can answer inside that block alone, and so many steps as ``offload_interval`` are asked about in one.
    """

    def __init__(
        self,
        stream: PrefetchedStream,
        prepare: Callable[[StepBatch], StepBatch],
        ask: Callable[[Batch], SignalFuture | None],
        turn: Callable[[], AbstractContextManager[None]] | None = None,
        offload_interval: int = 1,
    ) -> None:
        self._stream, self._prepare, self._ask = stream, prepare, ask
        self._turn, self._steps_per_turn = turn, offload_interval
        self._asked: deque[tuple[dict[str, int], RequestedStep]] = deque()

    @property
    def position(self) -> dict[str, int]:
        """Where the step that is handed out next is, though it may have been asked about already."""
        return self._asked[0][0] if self._asked else self._stream.position

    def take(self, *, more: int) -> RequestedStep:
        """The next step, after which ``more`` will follow; without turns the first of these has been asked about, too."""
        if not self._asked and self._turn is not None:
            with self._turn():
                self._ask_about(min(self._steps_per_turn, 1 + more))
        elif self._turn is None:
            self._ask_about(min(2, 1 + more) - len(self._asked))
        return self._asked.popleft()[1]

    def _ask_about(self, steps: int) -> None:
        for _ in range(steps):
            position = self._stream.position
            batch = self._prepare(next(self._stream))
            self._asked.append((position, RequestedStep(batch, tuple(map(self._ask, batch.micro_batches)))))


def prefetch_requests(
    batches: Iterable[Batch], ask: Callable[[Batch], SignalFuture | None]
) -> Iterator[tuple[Batch, SignalFuture | None]]:
    """Each batch with its answer to come, the batch after it already asked about."""
    waiting: tuple[Batch, SignalFuture | None] | None = None
    for batch in chain(batches, (None,)):
        asked = None if batch is None else (batch, ask(batch))
        if waiting is not None:
            yield waiting
        waiting = asked
