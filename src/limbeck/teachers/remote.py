"""A teacher in other processes: questions go out a step ahead, answers come back.

Which wire they travel on is the channel's affair; that its ranks may have to walk in step is this file's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.objectives import OutputHead
from limbeck.teachers.signals import SignalFuture, SignalSpec, TeacherRequest

_MOST = 2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)


@dataclass(frozen=True)
class TeacherResponse:
    """What came, [supervised, …] each, and the seconds that the teacher worked on it."""

    tensors: tuple[Tensor, ...]
    seconds: float


class Channel(Protocol):
    """The way to one teacher rank. What is asked over it is answered in that order."""

    def ask(self, question: TeacherRequest | None) -> Callable[[], TeacherResponse]:
        """Send a question and return at once; None only keeps the rank in step with others that are asked."""


@dataclass(frozen=True)
class Route:
    """Whom one asker asks: ``mine`` in turns; every question also steps the ``idle``, whom nobody else asks."""

    mine: tuple[int, ...]
    idle: tuple[int, ...] = ()


def route(student: int, students: int, teachers: int, *, in_step: bool) -> Route:
    """How the student's asker ``student`` of ``students`` reaches ``teachers`` ranks.

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
    """A teacher behind ``channels``, one for each of its ranks, as one student rank sees it.

    way: whom it asks. together: the ranks that share this rank's rows; the first of them asks for all, and tells the others
    what it was answered. head: the teacher's, if hidden states will be asked for. rest: lets all of the teacher's ranks leave
    their devices until they are asked again.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        way: Route,
        vocab_size: int,
        num_parameters: int,
        head: OutputHead | None = None,
        together: dist.ProcessGroup | None = None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_parameters = num_parameters
        self._head = head
        self._together = together
        self._speaks = together is None or dist.get_rank(together) == 0
        self._bytes, self._positions, self._seconds, self._answers = 0, 0, 0.0, 0
        self._mine = [channels[rank] for rank in way.mine]
        self._idle = [channels[rank] for rank in way.idle]
        self._asked = 0
        self._waiting: list[Callable[[], TeacherResponse]] = []
        self.rest = rest

    def ask(self, batch: Batch, wanted: SignalSpec) -> SignalFuture:
        """Send the question now; the answer waits until it has come."""
        reply = self._send(TeacherRequest.of(batch, wanted)) if self._speaks else None
        return lambda micro: wanted.signal(self._receive(reply, batch, micro), self._head)

    def _send(self, question: TeacherRequest) -> Callable[[], TeacherResponse]:
        channel = self._mine[self._asked % len(self._mine)]
        self._asked += 1
        reply = cache(channel.ask(question))
        self._waiting.append(reply)
        for other in self._idle:
            other.ask(None)
        return reply

    def _receive(self, reply: Callable[[], TeacherResponse] | None, batch: Batch, micro: Batch) -> tuple[Tensor, ...]:
        device = micro.input_ids.device
        here: tuple[Tensor, ...] | None = None
        if reply is not None:
            came = reply()
            if reply in self._waiting:
                self._waiting.remove(reply)
            self._bytes += sum(tensor.nbytes for tensor in came.tensors)
            self._positions += len(came.tensors[0])
            self._seconds += came.seconds
            self._answers += 1
            here = tuple(tensor.to(device, non_blocking=True).contiguous() for tensor in came.tensors)
        if self._together is None:
            assert here is not None
            return here
        everything = _told(here, self._together, device)
        mine = micro.supervised
        if len(mine) == len(batch.supervised):
            return everything
        rows = torch.searchsorted(batch.supervised.to(device), mine)  # both are in order, and one is part of the other
        return tuple(tensor.index_select(0, rows) for tensor in everything)

    def wait(self) -> None:
        """Return when everything that this rank has asked is answered."""
        while self._waiting:
            self._waiting.pop()()

    def measured(self) -> dict[str, float]:
        """What this rank received since the last call: bytes per position, and the teacher's seconds per question."""
        line = {
            "transport/bytes_per_token": self._bytes / max(self._positions, 1),
            "transport/megabytes": self._bytes / 1e6,
            "teacher/forward_seconds": self._seconds / max(self._answers, 1),
        }
        self._bytes, self._positions, self._seconds, self._answers = 0, 0, 0.0, 0
        return line


def _told(here: tuple[Tensor, ...] | None, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, ...]:
    """What the first rank of ``group`` has, on all of them: at most ``_MOST`` tensors, [supervised] or [supervised, width]."""
    first = dist.get_global_rank(group, 0)
    facts = [(_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape, 0)[:4] for tensor in here or ()]
    header = torch.tensor([*facts, *[(-1, 0, 0, 0)] * (_MOST - len(facts))], device=device)
    dist.broadcast(header, first, group=group)
    tensors = here or tuple(
        torch.empty(shape[:ndim], dtype=_DTYPES[dtype], device=device)
        for dtype, ndim, *shape in header.tolist()
        if dtype >= 0
    )
    for tensor in tensors:
        dist.broadcast(tensor, first, group=group)
    return tensors
