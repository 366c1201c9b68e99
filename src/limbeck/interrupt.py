"""Ctrl-C and SIGTERM ask the loop to stop after the step it is in; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Which signal has come, if any. looks: how often a loop has asked, which it does after every step."""

    def __init__(self) -> None:
        self.signal = self.looks = 0

    def look(self) -> int:
        """The signal, or 0."""
        self.looks += 1
        return self.signal

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; outside the main thread, where Python cannot, nothing is caught."""
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
