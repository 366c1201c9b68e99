"""A teacher in other processes.

A ``Channel`` is the connection to one teacher rank over one medium (Ray, HTTP, ...). ``RemoteTeacher`` distributes the
requests of one student rank over channels. A new medium implements ``Channel`` and calls ``connect_channels``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.objectives import OutputHead
from limbeck.strategies.named_tensors import broadcast_named
from limbeck.strategies.world import World
from limbeck.teachers.protocol import SignalFuture, TeacherContext, TeacherInfo
from limbeck.teachers.signals import SignalSpec, TeacherRequest, TeacherResponse


@dataclass(frozen=True)
class TeacherDescription:
    """Facts that a teacher rank reports: rows of its output head, parameters of the whole model."""

    vocab_size: int
    num_parameters: int


class Channel(Protocol):
    """The connection to one teacher rank. Requests are processed in the order in which they were sent."""

    def describe(self) -> TeacherDescription:
        """Facts about the teacher; blocks until it is loaded."""

    def head(self) -> OutputHead:
        """The teacher's output head, on the host."""

    def check(self, longest_row: int, largest_token: int) -> None:
        """Raise LimbeckError unless the teacher can process rows of that length with those token ids."""

    def send(self, request: TeacherRequest | None) -> Callable[[], TeacherResponse]:
        """Send a request and return at once; the result blocks until the response has arrived. None runs an empty
        forward pass that keeps the rank in step with others.
        """

    def offload(self) -> None:
        """Free the teacher's device until the next request."""


@dataclass(frozen=True)
class Route:
    """Teacher ranks that a student rank sends to, round-robin. Each request also sends a no-op to ``idle_ranks``, which
    nobody else sends to, so that collectives match.
    """

    targets: tuple[int, ...]
    idle_ranks: tuple[int, ...] = ()


def route(student: int, students: int, teachers: int, *, in_step: bool) -> Route:
    """How the student's data-parallel rank ``student`` of ``students`` reaches ``teachers`` ranks.

    Ranks that hold whole copies (not ``in_step``) are divided among the students. Ranks that share one model's
    parameters run every forward pass together, so each must receive equally many requests: the students fill the last
    round with no-ops.
    """
    if not in_step:
        return Route(tuple(range(student, teachers, students)) if teachers > students else (student % teachers,))
    rounds = -(-students // teachers)
    spare = range(students, rounds * teachers)
    return Route((student % teachers,), tuple(slot % teachers for slot in spare if slot % students == student))


class RemoteTeacher:
    """A teacher behind ``channels``, one for each of its ranks, as one student rank sees it.

    Args:
        channels: to all teacher ranks.
        route: which of them this rank uses.
        info: facts about the teacher, with the head if hidden states are requested.
        world: the student's processes. Ranks that work on the same rows share one request: the first sends it and
            broadcasts the response.
    """

    def __init__(self, channels: Sequence[Channel], route: Route, info: TeacherInfo, world: World) -> None:
        self._info = info
        self._world, self._channels = world, channels
        self._group = world.dims.model_group(world.device.type)
        self._sends = world.dims.leads_model_group(world.rank)
        self._targets = [channels[rank] for rank in route.targets]
        self._idle = [channels[rank] for rank in route.idle_ranks]
        self._sent = 0
        self._pending: list[Callable[[], TeacherResponse]] = []
        self._reset_metrics()

    @property
    def info(self) -> TeacherInfo:
        return self._info

    def request(self, batch: Batch, spec: SignalSpec) -> SignalFuture:
        pending = self._send(TeacherRequest.from_batch(batch, spec)) if self._sends else None
        return lambda micro: spec.decode(self._receive(pending, batch, micro), self._info.head)

    def metrics(self) -> dict[str, float]:
        """Bytes per position and in all, and the teacher's seconds per request, of this rank since the last call."""
        values = {
            "transport/bytes_per_token": self._bytes / max(self._positions, 1),
            "transport/megabytes": self._bytes / 1e6,
            "teacher/forward_seconds": self._seconds / max(self._responses, 1),
        }
        self._reset_metrics()
        return values

    def offload(self) -> None:
        while self._pending:
            self._pending.pop()()
        self._world.barrier()
        if self._world.is_main:
            for channel in self._channels:
                channel.offload()
        self._world.barrier()

    def reload(self) -> None:
        """The teacher's ranks reload themselves at the next request."""

    def _reset_metrics(self) -> None:
        self._bytes, self._positions, self._seconds, self._responses = 0, 0, 0.0, 0

    def _send(self, request: TeacherRequest) -> Callable[[], TeacherResponse]:
        channel = self._targets[self._sent % len(self._targets)]
        self._sent += 1
        pending = cache(channel.send(request))
        self._pending.append(pending)
        for other in self._idle:
            other.send(None)
        return pending

    def _receive(self, pending: Callable[[], TeacherResponse] | None, batch: Batch, micro: Batch) -> dict[str, Tensor]:
        device = micro.input_ids.device
        received: dict[str, Tensor] = {}
        if pending is not None:
            response = pending()
            if pending in self._pending:
                self._pending.remove(pending)
            self._bytes += sum(tensor.nbytes for tensor in response.tensors.values())
            self._positions += len(next(iter(response.tensors.values())))
            self._seconds += response.seconds
            self._responses += 1
            received = {
                name: tensor.to(device, non_blocking=True).contiguous() for name, tensor in response.tensors.items()
            }
        if self._group is None:
            return received
        everything = broadcast_named(received, self._group, 0, device)
        own = micro.supervised
        if len(own) == len(batch.supervised):
            return everything
        rows = torch.searchsorted(batch.supervised.to(device), own)  # both are sorted, and own is a subset
        return {name: tensor.index_select(0, rows) for name, tensor in everything.items()}


def connect_channels(context: TeacherContext, channels: Sequence[Channel]) -> RemoteTeacher:
    """The teacher behind ``channels``, one for each of its ranks. Every student rank calls this with all channels.

    Raises LimbeckError if the teacher cannot process the data.
    """
    world, config = context.world, context.config
    own = route(world.data_rank, world.dims.data_size, len(channels), in_step=context.in_step)
    first = channels[own.targets[0]]
    if context.shares_tokenizer:
        first.check(context.longest_row, context.largest_token)
    facts, head = first.describe(), None
    if SignalSpec(config.teacher_signal).needs_head:
        sent = first.head()
        weight, bias = sent.weight.to(world.device), None if sent.bias is None else sent.bias.to(world.device)
        head = OutputHead(weight, bias, sent.softcap, sent.scale)
    return RemoteTeacher(channels, own, TeacherInfo(facts.vocab_size, facts.num_parameters, head), world)
