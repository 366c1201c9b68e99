"""A measured quantity over steps, and how to shorten a long one."""

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
        """Returns only the points at ``steps``."""
        kept = np.isin(self.steps, steps)
        return Curve(self.label, self.steps[kept], self.values[kept])


def extremes(curve: Curve, limit: int = 600) -> Curve:
    """Returns at most ``limit`` points: the minimum and maximum of each section, so that no spike is lost."""
    if len(curve) <= limit:
        return curve
    sections = np.array_split(np.arange(len(curve)), limit // 2)
    lowest = [section[curve.values[section].argmin()] for section in sections]
    highest = [section[curve.values[section].argmax()] for section in sections]
    kept = np.unique(lowest + highest)
    return Curve(curve.label, curve.steps[kept], curve.values[kept])


def averages(curve: Curve, limit: int = 100) -> Curve:
    """Returns at most ``limit`` points, each the mean step and mean value of one section."""
    if len(curve) <= limit:
        return curve
    sections = np.array_split(np.arange(len(curve)), limit)
    steps = np.array([curve.steps[section].mean() for section in sections])
    values = np.array([curve.values[section].mean() for section in sections])
    return Curve(curve.label, steps, values)
