"""Stops a run after the current step on Ctrl-C or SIGTERM, and immediately on a second Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """The number of the signal that this process has received.

    Attributes:
        signal: its number, or 0.
        polls: number of calls of ``poll``, which a training loop makes after every step.
    """

    def __init__(self) -> None:
        self.signal = self.polls = 0

    def poll(self) -> int:
        """The number of the received signal, or 0."""
        self.polls += 1
        return self.signal

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM within the block. Outside the main thread, where Python cannot, nothing is caught."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._arrived) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
