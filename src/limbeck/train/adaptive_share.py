"""A share of samples that the student writes, which grows when the validation stops improving."""

from __future__ import annotations

from collections.abc import Mapping

from limbeck.config.schema.schedules import AdaptiveSchedule


class AdaptiveShare:
    """The share, by the rule of ``AdaptiveSchedule``."""

    def __init__(self, schedule: AdaptiveSchedule) -> None:
        self._schedule, self._share = schedule, schedule.start
        self._reference: float | None = None

    def at(self, step: int, total_steps: int) -> float:
        """The share in any step until the next validation."""
        return self._share

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a validation into account."""
        value = metrics.get(self._schedule.metric)
        if value is None:
            return
        if self._reference is None:
            self._reference = value
        elif value >= self._reference + self._schedule.tolerance:
            self._share = min(self._share + self._schedule.increment, self._schedule.end)
            self._reference = value

    def state(self) -> dict[str, float | None]:
        """JSON values from which ``load`` continues."""
        return {"share": self._share, "reference": self._reference}

    def load(self, state: Mapping[str, float | None]) -> None:
        """The inverse of ``state``."""
        share = state["share"]
        assert share is not None
        self._share, self._reference = share, state["reference"]
