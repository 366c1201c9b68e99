"""When a run saves or ends because of the time: ``save_minutes`` and ``checkpoint_config.save_before``."""

from __future__ import annotations

import time
from collections.abc import Callable

from limbeck.config import DistillConfig
from limbeck.strategies.world import World

_LEAST_RESERVE = 60.0  # seconds; the first save may be the last one, and how long it takes is not known before


class TimeLimits:
    """Follows the clock of the main process, so that all ranks decide alike.

    Args:
        config: of the run.
        world: the ranks.
        clock: seconds, from any origin. The run starts now.
    """

    def __init__(self, config: DistillConfig, world: World, clock: Callable[[], float] = time.monotonic) -> None:
        self._world, self._clock = world, clock
        self._between = None if config.save_minutes is None else 60 * config.save_minutes
        limit = config.checkpoint_config.save_before
        self._limit = None
        if limit is not None:
            hours, minutes = map(int, limit.split(":"))
            self._limit = 3600 * hours + 60 * minutes
        self._started = self._saved = self._checked = clock()
        self._longest_step = 0.0

    def training_starts(self) -> None:
        """The models are loaded; what follows are steps."""
        self._saved = self._checked = self._clock()

    def saved(self) -> None:
        """A checkpoint has been written, or is being written."""
        self._saved = self._clock()

    def save_is_due(self) -> bool:
        """Whether the last checkpoint is older than ``save_minutes``. Collective."""
        return self._between is not None and self._agree(self._clock() - self._saved >= self._between)

    def is_out_of_time(self, longest_save: float) -> bool:
        """Whether another step, as long as the longest so far with its validation and save, may not leave the time for the
        last save before ``save_before``. To be called after every step. Collective.

        Args:
            longest_save: seconds.
        """
        if self._limit is None:
            return False
        now = self._clock()
        self._longest_step, self._checked = max(self._longest_step, now - self._checked), now
        reserve = self._longest_step + max(longest_save, _LEAST_RESERVE)
        return self._agree(now - self._started + reserve >= self._limit)

    def _agree(self, decision: bool) -> bool:
        return bool(self._world.max(float(decision and self._world.is_main)))
