"""Progress of the student's workers, collected without blocking."""

from __future__ import annotations

import time
from dataclasses import dataclass

from limbeck.cluster.calls import result
from limbeck.cluster.groups import WorkerGroup
from limbeck.cluster.session import load_ray

_LAST_SECONDS = 60


@dataclass(frozen=True)
class Progress:
    """Progress of one student rank. steps: optimizer steps finished; rows: tokenised; lines: console lines since the
    previous report.
    """

    steps: int
    rows: int
    lines: tuple[str, ...] = ()


class ProgressMonitor:
    """Requests the progress of every rank, one request at a time each, and does not wait for the reports."""

    def __init__(self, students: WorkerGroup) -> None:
        self._actors, now = students.actors, time.monotonic()
        self._requests = [actor.drain_progress.remote() for actor in self._actors]
        self._responded_at = [now] * len(self._actors)
        self._progressed_at = now
        self.latest = Progress(0, 0)

    def poll(self) -> tuple[str, ...]:
        """Take the reports that have arrived; returns the console lines of the main rank."""
        lines: tuple[str, ...] = ()
        for rank, request in enumerate(self._requests):
            if rank and self.latest.steps:
                break  # from here on the ranks advance together
            if not load_ray().wait([request], timeout=0)[0]:
                continue
            self._responded_at[rank] = time.monotonic()
            progress: Progress = result(request, f"student-{rank}", None)
            self._requests[rank] = self._actors[rank].drain_progress.remote()
            if rank:
                continue
            if progress.lines or (progress.steps, progress.rows) != (self.latest.steps, self.latest.rows):
                self._progressed_at = time.monotonic()
            self.latest, lines = progress, progress.lines
        return lines

    def last_lines(self) -> list[str]:
        """The remaining console lines of a finished run."""
        requests = (self._requests[0], self._actors[0].drain_progress.remote())
        return [line for request in requests for line in result(request, "student-0", _LAST_SECONDS).lines]

    @property
    def quiet_seconds(self) -> float:
        """Seconds since the main rank finished a step, tokenised a row or printed a line."""
        return time.monotonic() - self._progressed_at

    @property
    def stalled_seconds(self) -> float:
        """Seconds without progress after which a rank may count as hung.

        Before the first step a rank that responds does not count as hung: reading files, importing and loading take as
        long as the storage needs, and waits for peers and teachers have limits of their own.
        """
        if self.latest.steps:
            return self.quiet_seconds
        return time.monotonic() - min(self._responded_at)
