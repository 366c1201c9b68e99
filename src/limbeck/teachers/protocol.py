"""What the training loop knows of a teacher.

A teacher is something that a rank sends requests to. It may run in this process, in other processes, behind a server or
on disk; implementations are registered in ``limbeck.registry.TEACHERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from limbeck.config import DistillConfig
from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError
from limbeck.objectives import OutputHead
from limbeck.strategies.world import World
from limbeck.teachers.signals import Signal, SignalSpec

SignalFuture = Callable[[Batch], Signal]
"""Future of a teacher signal: call it with the micro-batch on the device; it blocks until the signal has arrived.

A rank that needs only a part of the supervised positions calls it with a batch of these.
"""


@dataclass(frozen=True)
class TeacherInfo:
    """Facts about a teacher.

    vocab_size: rows of the output head, some of which may be padding. num_parameters: of the whole model. head: the
    output head on this rank's device if the signals are hidden states, else None.
    """

    vocab_size: int
    num_parameters: int
    head: OutputHead | None = None


@dataclass(frozen=True)
class TeacherContext:
    """Input of a teacher source (see ``limbeck.registry.TEACHERS``).

    config: of the run. world: the student's processes. longest_row: of the data, in tokens. largest_token: the highest
    token id of the data. shares_tokenizer: False if requests are in the teacher's own tokens. workers: Ray actors of the
    teacher's ranks, if the run has started or found any. in_step: whether these must run every forward pass together.
    tokens: of the whole run, with those that are not supervised.
    """

    config: DistillConfig
    world: World
    longest_row: int
    largest_token: int
    shares_tokenizer: bool = True
    workers: Sequence[Any] = ()
    in_step: bool = False
    tokens: float = 0.0


class Teacher(Protocol):
    """Computes signals for micro-batches."""

    @property
    def info(self) -> TeacherInfo:
        """Facts about the teacher."""

    def request(self, batch: Batch, spec: SignalSpec) -> SignalFuture:
        """Send a micro-batch (on the host) and return at once. Futures may be called in any order."""

    def metrics(self) -> dict[str, float]:
        """Values to log since the last call, by name; empty if there are none."""

    def offload(self) -> None:
        """Wait for the requests that were sent, then free the devices until the next request. Every rank calls it."""

    def reload(self) -> None:
        """The inverse of ``offload``; a request reloads the teacher too."""


def receive_signal(future: SignalFuture | None, batch: Batch) -> Signal | None:
    """The signal for ``batch``; None if none was requested. Blocks until it has arrived.

    Raises:
        LimbeckError: if a plug-in's ``request`` returned anything but a function that returns a ``Signal``.
    """
    if future is None:
        return None
    signal = future(batch) if callable(future) else None
    if not isinstance(signal, Signal):
        given = f"a function that returns a {type(signal).__name__}" if callable(future) else type(future).__name__
        raise LimbeckError(
            f"the teacher's method request returned {given}; return a function of the micro-batch that returns a "
            "limbeck.teachers.Signal."
        )
    return signal
