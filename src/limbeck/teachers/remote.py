"""A teacher in other processes: questions go out a step ahead, hidden states come back, the head came once.

Which wire they travel on is the channel's affair; that its ranks may have to walk in step is this file's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.objectives import OutputHead
from limbeck.teachers.signal import Answer, Question, Signal


@dataclass(frozen=True)
class Reply:
    """Hidden states [supervised, H] on the host, and the seconds that the teacher worked on them."""

    hidden: Tensor
    seconds: float


class Channel(Protocol):
    """The way to one teacher rank. What is asked over it is answered in that order."""

    def ask(self, question: Question | None) -> Callable[[], Reply]:
        """Send a question and return at once; None only keeps the rank in step with others that are asked."""


@dataclass(frozen=True)
class Route:
    """Whom one student rank asks: ``mine`` in turns; every question also steps the ``idle``, whom nobody else asks."""

    mine: tuple[int, ...]
    idle: tuple[int, ...] = ()


def route(student: int, students: int, teachers: int, *, in_step: bool) -> Route:
    """How student rank ``student`` of ``students`` reaches ``teachers`` ranks.

    Teachers that are whole copies (not ``in_step``) are shared out, several to a student where there are more of them.
    Those that share one model's parameters run every forward pass together, so that each must be asked equally often: the
    places that are left in the last round are filled by the students in turn.
    """
    if not in_step:
        return Route(tuple(range(student, teachers, students)) if teachers > students else (student % teachers,))
    rounds = -(-students // teachers)
    spare = range(students, rounds * teachers)
    return Route((student % teachers,), tuple(slot % teachers for slot in spare if slot % students == student))


class RemoteTeacher:
    """A teacher behind ``channels``, one for each of its ranks, as one student rank sees it."""

    def __init__(self, channels: Sequence[Channel], way: Route, head: OutputHead, num_parameters: int) -> None:
        self.head = head
        self.num_parameters = num_parameters
        self._bytes, self._positions, self._seconds, self._answers = 0, 0, 0.0, 0
        self._mine = [channels[rank] for rank in way.mine]
        self._idle = [channels[rank] for rank in way.idle]
        self._asked = 0

    def ask(self, batch: Batch) -> Answer:
        """Send the question now; the answer waits until it has come."""
        channel = self._mine[self._asked % len(self._mine)]
        self._asked += 1
        reply = channel.ask(Question.of(batch))
        for other in self._idle:
            other.ask(None)
        return lambda micro: self._receive(reply, micro)

    def _receive(self, reply: Callable[[], Reply], micro: Batch) -> Signal:
        came = reply()
        self._bytes += came.hidden.nbytes
        self._positions += len(came.hidden)
        self._seconds += came.seconds
        self._answers += 1
        return Signal(came.hidden.to(micro.input_ids.device, non_blocking=True), self.head)

    def measured(self) -> dict[str, float]:
        """What this rank received since the last call: bytes per position, and the teacher's seconds per question."""
        line = {
            "transport/bytes_per_token": self._bytes / max(self._positions, 1),
            "transport/megabytes": self._bytes / 1e6,
            "teacher/forward_seconds": self._seconds / max(self._answers, 1),
        }
        self._bytes, self._positions, self._seconds, self._answers = 0, 0, 0.0, 0
        return line
