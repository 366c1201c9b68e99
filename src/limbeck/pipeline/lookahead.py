"""The next step's questions are put to the teacher before this step is trained, so that a teacher elsewhere works meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import NamedTuple

from limbeck.data import PrefetchedStream
from limbeck.data.batch import Batch, GlobalBatch
from limbeck.teachers import Answer


class AskedStep(NamedTuple):
    """One optimizer step with an answer to come for each of its micro-batches; None where nobody was asked."""

    batch: GlobalBatch
    answers: tuple[Answer | None, ...]


class Lookahead:
    """The steps of ``stream``, each made ready by ``prepare`` and asked about with ``ask`` one step ahead of its turn.

    Every rank looks ahead at the same moments, so that what they must do together they do together. With a ``turn``, a teacher
    can answer inside that block alone, and so many steps as ``steps_per_turn`` are asked about in one.
    """

    def __init__(
        self,
        stream: PrefetchedStream,
        prepare: Callable[[GlobalBatch], GlobalBatch],
        ask: Callable[[Batch], Answer | None],
        turn: Callable[[], AbstractContextManager[None]] | None = None,
        steps_per_turn: int = 1,
    ) -> None:
        self._stream, self._prepare, self._ask = stream, prepare, ask
        self._turn, self._steps_per_turn = turn, steps_per_turn
        self._asked: deque[tuple[dict[str, int], AskedStep]] = deque()

    @property
    def position(self) -> dict[str, int]:
        """Where the step that is handed out next is, though it may have been asked about already."""
        return self._asked[0][0] if self._asked else self._stream.position

    def take(self, *, more: int) -> AskedStep:
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
            self._asked.append((position, AskedStep(batch, tuple(map(self._ask, batch.micro_batches)))))


def asked_ahead(
    batches: Iterable[Batch], ask: Callable[[Batch], Answer | None]
) -> Iterator[tuple[Batch, Answer | None]]:
    """Each batch with its answer to come, the batch after it already asked about."""
    waiting: tuple[Batch, Answer | None] | None = None
    for batch in chain(batches, (None,)):
        asked = None if batch is None else (batch, ask(batch))
        if waiting is not None:
            yield waiting
        waiting = asked
