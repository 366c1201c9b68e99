"""Stops a run after the current step on Ctrl-C or SIGTERM, and immediately on a second Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVES = "Stopping after this step and saving"
ENDS = "Stopping"
"""Notices: what a first signal leads to."""

_UNWINDING_SECONDS = 10


class StopRequest:
    """The number of the signal that this process has received.

    Attributes:
        signal: its number, or 0.
        polls: number of calls of ``poll``, which a training loop makes after every step.
        notice: printed when the signal arrives; None prints nothing.
    """

    def __init__(self, notice: str | None = None) -> None:
        self.signal = self.polls = 0
        self.notice = notice
        self._quits = False

    def poll(self) -> int:
        """The number of the received signal, or 0."""
        self.polls += 1
        return self.signal

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        # Two signals during one operation call this once.
        if number == signal.SIGINT and (self.signal or self._quits):
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_requests(notice: str | None = None) -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM within the block. Outside the main thread, where Python cannot, nothing is caught.

    A second SIGINT raises KeyboardInterrupt. If the main thread does not leave the block within some seconds, because it
    is in a computation or a collective that does not return, the process ends.

    Args:
        notice: printed to standard error when the first signal arrives, also during a long step; None prints nothing.
    """
    request = StopRequest(notice)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # Python runs a handler when the main thread is back from the current operation. The pipe is written at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    left = threading.Event()
    thread = threading.Thread(target=_react, args=(reader, request, left), daemon=True)
    before = {number: signal.signal(number, request._arrived) for number in (signal.SIGINT, signal.SIGTERM)}
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield request
    finally:
        left.set()
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread
        thread.join()
        os.close(reader)


def _react(reader: int, request: StopRequest, left: threading.Event) -> None:
    """Print the notices, and end a process whose main thread does not react to a second Ctrl-C."""
    received = 0
    while data := os.read(reader, 64):
        for number in data:
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            received += 1
            if received == 1 and request.notice:
                again = "quit without saving" if request.notice == SAVES else "quit at once"
                _print(f"{request.notice}; press Ctrl-C again to {again}.")
            elif received > 1 and number == signal.SIGINT:
                request._quits = True
                if request.notice:
                    _print("Quitting without saving." if request.notice == SAVES else "Quitting.")
                if not left.wait(_UNWINDING_SECONDS):
                    os._exit(128 + signal.SIGINT)


def _print(text: str) -> None:
    # Not through sys.stderr, whose lock the main thread may hold. In a terminal the progress bar is on this line.
    os.write(2, f"\r\x1b[2K{text}\n".encode() if os.isatty(2) else f"{text}\n".encode())
