"""A question to a teacher's worker and its reply, over Ray's object store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.cluster.wire import unflat
from limbeck.cluster.workers import result
from limbeck.teachers import Question, Reply


@dataclass(frozen=True)
class RayChannel:
    """The way to the worker ``actor``; an answer that has not come after ``seconds`` never will."""

    actor: Any
    name: str
    seconds: float

    def ask(self, question: Question | None) -> Callable[[], Reply]:
        """One message there and one back, whatever the batch."""
        ref = self.actor.answer.remote(question)

        def reply() -> Reply:
            tensors, seconds = result(ref, self.name, self.seconds)
            return Reply(tuple(map(unflat, tensors)), seconds)

        return reply
