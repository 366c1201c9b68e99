"""Work behind the training loop that all ranks do together, step by step, in one thread of each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from limbeck.errors import LimbeckError
from limbeck.strategies.world import BARRIER_TIMEOUT, World
from limbeck.train.gather import gather_json


class BackgroundWork:
    """Runs one job at a time in a thread. A job that fails on one rank fails on all, at the next ``wait``.

    Args:
        world: the ranks. They have a process group of their own here, so a job may communicate while the loop does.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._group = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT) if world.size > 1 else None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run ``job`` behind the caller; the previous one must have been waited for. Collective."""
        assert self._job is None
        self._job = self._thread.submit(job)

    def wait(self) -> None:
        """Return when the job has ended; at once without one. Collective.

        Raises:
            LimbeckError: if it failed, on any rank.
        """
        job = self._job
        if job is not None:
            try:
                job.result()
            finally:
                if job.done():  # else the caller was interrupted, and may wait again
                    self._job = None

    def together(self, part: Callable[[], Any]) -> list[Any]:
        """What ``part`` returns on every rank, as JSON values; to be called by a job. Collective.

        Raises:
            LimbeckError: on all ranks, if it raised an exception on one.
        """
        failure = None
        outcome: dict[str, Any] = {}
        try:
            outcome["value"] = part()
        except Exception as error:  # whatever it is, the other ranks must not wait
            failure = error
            of_rank = f"rank {self._world.rank}: " if self._world.size > 1 else ""
            outcome["error"] = of_rank + _describe(error)
        try:
            outcomes = gather_json(outcome, self._world, self._group)
        except RuntimeError as error:  # gloo's, when a connection closes
            raise LimbeckError(outcome.get("error", "another rank has ended")) from (failure or error)
        failed = [found["error"] for found in outcomes if "error" in found]
        if failed:
            raise LimbeckError(failed[0]) from failure
        return [found["value"] for found in outcomes]


def _describe(error: Exception) -> str:
    if isinstance(error, OSError | LimbeckError) or type(error) is Exception:  # which tokenizers raises for a full disk
        return str(error)
    return f"{type(error).__name__}: {error}"
