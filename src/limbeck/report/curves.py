"""A measured quantity over steps, and how a long one is made short. Nothing here knows what is measured or drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Finite ``values`` [points] at increasing ``steps`` [points]."""

    label: str
    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, steps: np.ndarray) -> Curve:
        """Only the points at ``steps``."""
        kept = np.isin(self.steps, steps)
        return Curve(self.label, self.steps[kept], self.values[kept])


def extremes(curve: Curve, limit: int = 600) -> Curve:
    """At most ``limit`` of the curve's points: the lowest and the highest of every stretch, so no spike is lost."""
    if len(curve) <= limit:
        return curve
    stretches = np.array_split(np.arange(len(curve)), limit // 2)
    lowest = [stretch[curve.values[stretch].argmin()] for stretch in stretches]
    highest = [stretch[curve.values[stretch].argmax()] for stretch in stretches]
    kept = np.unique(lowest + highest)
    return Curve(curve.label, curve.steps[kept], curve.values[kept])


def averages(curve: Curve, limit: int = 100) -> Curve:
    """At most ``limit`` points, each the mean step and the mean value of one stretch."""
    if len(curve) <= limit:
        return curve
    stretches = np.array_split(np.arange(len(curve)), limit)
    steps = np.array([curve.steps[stretch].mean() for stretch in stretches])
    values = np.array([curve.values[stretch].mean() for stretch in stretches])
    return Curve(curve.label, steps, values)
