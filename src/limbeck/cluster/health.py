"""Which workers are alive: health checks that do not block a run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from limbeck.cluster.calls import WorkerLost, result
from limbeck.cluster.groups import WorkerGroup
from limbeck.cluster.session import load_ray

_CHECK_SECONDS = 5


class HealthMonitor:
    """Sends each worker of a connected group one health check at a time and does not wait for the result."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._seen = list(map(_process, group.call("about")))
        self._checks: dict[int, tuple[Any, float]] = {}
        self._next = 0.0

    def restarted(self) -> list[str]:
        """A sentence for each worker that Ray has restarted since the last call."""
        if time.monotonic() >= self._next:
            self._send_checks()
        lines = []
        for rank, (ref, _) in list(self._checks.items()):
            if not load_ray().wait([ref], timeout=0)[0]:
                continue
            del self._checks[rank]
            name = f"{self._group.name}-{rank}"
            with suppress(WorkerLost):  # the run notices at its next call
                now = _process(result(ref, name, 0))
                if now != self._seen[rank]:
                    self._seen[rank] = now
                    lines.append(f"{name} died; Ray has started it again ({now}), and its requests are repeated.")
        return lines

    def unresponsive(self, seconds: float) -> list[str]:
        """Names of the workers that are dead or have not responded within ``seconds``; blocks for that long at most."""
        self._send_checks()
        refs = [ref for ref, _ in self._checks.values()]
        until = min(since for _, since in self._checks.values()) + seconds
        ready = load_ray().wait(refs, num_returns=len(refs), timeout=max(0, until - time.monotonic()))[0]
        return [
            f"{self._group.name}-{rank}" for rank, (ref, _) in self._checks.items() if ref not in ready or _failed(ref)
        ]

    def _send_checks(self) -> None:
        now = time.monotonic()
        self._next = now + _CHECK_SECONDS
        for rank, actor in enumerate(self._group.actors):
            if rank not in self._checks:
                self._checks[rank] = (actor.about.remote(), now)


def find_lost(groups: Sequence[WorkerGroup], seconds: float) -> tuple[list[str], list[str]]:
    """Two lists of sentences: one for each dead worker, and one for each that has not responded within ``seconds``.

    The first failure of a run is often that of a peer of the worker that was lost, so all workers are checked. A worker
    that does not respond may be computing.
    """
    ray = load_ray()
    checks = {
        actor.about.remote(): f"{group.name}-{rank}" for group in groups for rank, actor in enumerate(group.actors)
    }
    ready = ray.wait(list(checks), num_returns=len(checks), timeout=seconds)[0] if checks else []
    dead = []
    for ref in ready:
        try:
            result(ref, checks[ref], 0)
        except WorkerLost as lost:
            dead.append(str(lost))
    return dead, [f"{name} does not respond" for ref, name in checks.items() if ref not in ready]


def _process(about: Mapping[str, Any]) -> str:
    return f"process {about['pid']} on {about['host']}"


def _failed(ref: Any) -> bool:
    try:
        result(ref, "", 0)
    except WorkerLost:
        return True
    return False
