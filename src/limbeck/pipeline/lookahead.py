"""The next step's questions are put to the teacher before this step is trained, so that a teacher elsewhere works meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

    Every rank looks ahead at the same moments, so that what they must do together they do together.
    """

    def __init__(
        self,
        stream: PrefetchedStream,
        prepare: Callable[[GlobalBatch], GlobalBatch],
        ask: Callable[[Batch], Answer | None],
    ) -> None:
        self._stream, self._prepare, self._ask = stream, prepare, ask
        self._next: AskedStep | None = None
        self._position = stream.position

    @property
    def position(self) -> dict[str, int]:
        """Where the step that is handed out next is, though it may have been asked about already."""
        return self._stream.position if self._next is None else self._position

    def take(self, *, more: bool) -> AskedStep:
        """The next step; ``more`` says that another will follow, which is asked about before this one is returned."""
        step = self._next or self._make()
        self._next = None
        if more:
            self._position = self._stream.position
            self._next = self._make()
        return step

    def _make(self) -> AskedStep:
        batch = self._prepare(next(self._stream))
        return AskedStep(batch, tuple(map(self._ask, batch.micro_batches)))


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
