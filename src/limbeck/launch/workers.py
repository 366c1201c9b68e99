"""A rank of the student as a Ray actor: the ordinary training loop, with a teacher in other workers or in this one.

The program that starts workers imports this file too, so models and losses are imported by the actors only.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.cluster.actors import Worker, failures_logged
from limbeck.config import DistillConfig
from limbeck.interrupt import StopRequest
from limbeck.launch.progress import Progress
from limbeck.train.result import RunResult


class StudentWorker(Worker):
    """One rank of the student."""

    needs = "limbeck.train.loop"

    def __init__(self, name: str, log: str, values: Mapping[str, Any]) -> None:
        super().__init__(name, log)
        self.config = DistillConfig.model_validate(values)
        self._stop, self._console, self._rows = StopRequest(), LogBuffer(), 0

    def run(self, teachers: Sequence[Any], in_step: bool) -> RunResult:
        """Train to the end.

        Args:
            teachers: the teacher's actors; empty if the student's processes hold the teacher.
            in_step: whether these run every forward pass together.
        """
        from limbeck.plan.adapt import adapt
        from limbeck.train.loop import DistillPipeline, Surroundings

        with failures_logged():
            surroundings = Surroundings(tuple(teachers), in_step, self._stop, self._console, self._count_rows)
            return DistillPipeline(self.config, adapt).run_in(self.world, surroundings)

    def stop(self, signal: int) -> None:
        """Stop the loop after the current step, as the signal ``signal`` would."""
        self._stop.signal = signal

    def drain_progress(self) -> Progress:
        """The progress so far; its lines are those since the last call."""
        return Progress(self._stop.polls, self._rows, tuple(self._console.drain()))

    def _count_rows(self, rows: int) -> None:
        self._rows = rows


class LogBuffer(io.StringIO):
    """Text stream that writes to the worker's log and keeps complete lines until they are drained."""

    def __init__(self) -> None:
        super().__init__()
        self._lock, self._text = threading.Lock(), ""

    def write(self, text: str) -> int:
        with self._lock:
            self._text += text
        return sys.stdout.write(text)

    def drain(self) -> list[str]:
        """The complete lines written since the last call."""
        with self._lock:
            whole, _, self._text = self._text.rpartition("\n")
        return whole.splitlines()
