"""Where metrics are written. A tracker takes a step and a flat dict of numbers; ``limbeck.registry.TRACKERS`` names
them.

``metrics.jsonl`` is written by the loop itself. Every other tracker runs in a thread of its own, so that one that is slow
or fails neither delays the training nor ends it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from limbeck.errors import LimbeckError
from limbeck.registry import TRACKERS, check_members

_CLOSE_SECONDS = 60.0
"""How long the end of a run waits for what a tracker has not sent yet."""

_GOES_ON = "the run goes on, and metrics.jsonl has all metrics."

_SECRETS = re.compile(r"(API_?KEY|TOKEN|PASSWORD|SECRET)$")
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")


class Tracker(Protocol):
    """Records metrics. It may also have these methods:

    ``log_file(path)`` stores a file with the run. The report of the run is written for trackers that have it.

    ``check(tracker_kwargs)``, of the registered class or function, raises LimbeckError if the tracker cannot be used, such as
    without its library or a login. It is called before models are loaded, and uses no network.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` of optimizer step ``step``."""

    def close(self) -> None:
        """Everything logged is stored when this returns."""


class BackgroundTracker:
    """Calls a tracker in a thread. Errors are counted, and the first is a notice.

    Args:
        name: of the tracker, for notices.
        tracker: what is called; None if it could not start.
        failure: why it could not start.
    """

    def __init__(self, name: str, tracker: Tracker | None, failure: str = "") -> None:
        self.takes_files = hasattr(tracker, "log_file")
        self._name, self._tracker = name, tracker
        self._failed, self._notices = 0, SimpleQueue[str]()
        self._calls = SimpleQueue[Callable[[], object] | None]()
        self._thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        if tracker is None:
            self._notices.put(f"the tracker {name} {failure}; {_GOES_ON}")
        else:
            self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._tracker is not None:
            self._calls.put(partial(self._tracker.log, step, dict(values)))

    def log_file(self, path: Path) -> None:
        """Store a file with the run, if the tracker can."""
        if self.takes_files:
            self._calls.put(partial(getattr(self._tracker, "log_file"), path))  # noqa: B009  no member of the protocol

    def close(self) -> None:
        """Wait until everything is stored, but not for a tracker that does not respond. Later calls do nothing."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        self._calls.put(tracker.close)
        self._calls.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._notices.put(f"the tracker {self._name} has not stored everything after {_CLOSE_SECONDS:g} seconds.")
        if self._failed > 1:
            self._notices.put(f"the tracker {self._name} failed {self._failed} times.")

    def notices(self) -> list[str]:
        """Sentences for the console, each once."""
        return [self._notices.get() for _ in range(self._notices.qsize())]

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # of any library, of its network or of a plug-in
                self._failed += 1
                if self._failed == 1:
                    self._notices.put(f"the tracker {self._name} failed ({explain(error)}); {_GOES_ON}")


def explain(error: Exception) -> str:
    """The message of ``error`` on one line, without passwords of addresses and secrets of the environment."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    for name, value in os.environ.items():
        if value and _SECRETS.search(name):
            text = text.replace(value, f"({name})")
    return _USER_INFO.sub("", text)


def make_nothing(log_dir: Path, kwargs: dict[str, Any]) -> None:
    """No tracker: ``metrics.jsonl`` is written and the console prints every line anyway."""


def register_tracker(name: str, make: Callable[[Path, dict[str, Any]], Tracker | None]) -> None:
    """Make ``track_with: name`` call ``make(logging folder, tracker_kwargs)``."""
    TRACKERS.register(name)(make)


def check_trackers(trackers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise LimbeckError if a tracker, given by name with its arguments, cannot be used. Uses no network."""
    for name, kwargs in trackers.items():
        check = getattr(TRACKERS.get(name), "check", None)
        if check is not None:
            check(kwargs)


def make_trackers(trackers: Mapping[str, Mapping[str, Any]], log_dir: Path) -> list[BackgroundTracker]:
    """Start the trackers, given by name with their arguments. One that cannot start has a notice, and records nothing.

    Raises:
        LimbeckError: if an argument is wrong, or a tracker lacks a method.
    """
    made = []
    for name, kwargs in trackers.items():
        try:
            tracker: Tracker | None = TRACKERS.get(name)(log_dir, dict(kwargs))
        except LimbeckError:
            raise
        except Exception as error:  # such as of a server that does not respond
            made.append(BackgroundTracker(name, None, f"could not start ({explain(error)})"))
            continue
        if tracker is not None:
            check_members(f"the tracker of track_with = {name}", tracker, ("log", "close"))
            made.append(BackgroundTracker(name, tracker))
    return made
