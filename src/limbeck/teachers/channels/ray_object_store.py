"""A channel to a teacher's Ray actor over Ray's object store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.cluster.groups import result
from limbeck.cluster.tensors import unpack
from limbeck.objectives import OutputHead
from limbeck.teachers.remote import TeacherDescription
from limbeck.teachers.signals import TeacherRequest, TeacherResponse


@dataclass(frozen=True)
class RayChannel:
    """The connection to ``actor`` (a ``TeacherWorker``). A call that has not returned after ``seconds`` counts as
    lost.
    """

    actor: Any
    name: str
    seconds: float

    def describe(self) -> TeacherDescription:
        return TeacherDescription(*self._call("load"))

    def head(self) -> OutputHead:
        sent = self._call("head")
        bias = None if sent["bias"] is None else unpack(sent["bias"])
        return OutputHead(unpack(sent["weight"]), bias, sent["softcap"], sent["scale"])

    def check(self, longest_row: int, largest_token: int) -> None:
        self._call("check", longest_row, largest_token)

    def send(self, request: TeacherRequest | None) -> Callable[[], TeacherResponse]:
        # One message each way, whatever the batch.
        ref = self.actor.respond.remote(request)

        def response() -> TeacherResponse:
            tensors, seconds = result(ref, self.name, self.seconds)
            return TeacherResponse({name: unpack(packed) for name, packed in tensors.items()}, seconds)

        return response

    def offload(self) -> None:
        self._call("offload")

    def _call(self, method: str, *arguments: Any) -> Any:
        return result(getattr(self.actor, method).remote(*arguments), self.name, self.seconds)
