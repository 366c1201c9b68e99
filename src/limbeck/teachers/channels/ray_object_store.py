"""A question to a teacher's worker and its reply, over Ray's object store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.cluster.groups import result
from limbeck.cluster.tensors import unflat
from limbeck.teachers import TeacherRequest, TeacherResponse


@dataclass(frozen=True)
class RayChannel:
    """The way to the worker ``actor``; an answer that has not come after ``seconds`` never will."""

    actor: Any
    name: str
    seconds: float

    def ask(self, question: TeacherRequest | None) -> Callable[[], TeacherResponse]:
        """One message there and one back, whatever the batch."""
        ref = self.actor.answer.remote(question)

        def reply() -> TeacherResponse:
            tensors, seconds = result(ref, self.name, self.seconds)
            return TeacherResponse(tuple(map(unflat, tensors)), seconds)

        return reply
