"""Calls with a time limit, for code that is not ours and may hang."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

_Jobs = SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]


class LateCallError(Exception):
    """A call took longer than it may."""


class TimedCalls:
    """Makes calls one after the other in a thread of their own. A call that takes too long goes on in its thread, and later
    calls are made in another one. No thread keeps the process alive.

    Args:
        seconds: limit of a call; None for calls without one, in the thread of the caller.
        device: the current GPU of the threads, if it is one.
    """

    def __init__(self, seconds: float | None, device: torch.device) -> None:
        self._seconds, self._device = seconds, device
        self._jobs: _Jobs | None = None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function`` returns. Raises what it raises, or LateCallError after the time limit."""
        if self._seconds is None:
            return function(*args)
        if self._jobs is None:
            self._jobs = SimpleQueue()
            Thread(target=_work, args=(self._jobs, self._device), daemon=True).start()
        future: Future[Any] = Future()
        self._jobs.put((future, function, args))
        if not wait([future], self._seconds).done:
            self.close()
            raise LateCallError(f"no result after {self._seconds:g} seconds")
        return future.result()

    def close(self) -> None:
        """End the thread after the call that it makes."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None


def _work(jobs: _Jobs, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has a current device of its own
    while (job := jobs.get()) is not None:
        future, function, args = job
        try:
            future.set_result(function(*args))
        except BaseException as error:  # the caller raises it
            future.set_exception(error)
        del job, future, args  # while it waits, the thread keeps nothing alive
