"""Curves as SVG text. Colours are classes (``s1`` to ``s6``) that the page's style sheet fills, for light and for dark.

See ``curves.py`` for how long curves are shortened before they are drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from limbeck.report.curves import Curve, averages, extremes

SERIES = 6
"""Number of series colours; later series reuse them from the first."""

_WIDTH, _HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 500, 8, 204
_ZEROS = re.compile(r"(\.\d*?)0+(?=\D|$)")  # trailing zeros of a tick such as 0.500 or 20.0%
_FEW = 40  # up to this number of points, each is drawn as a dot


@dataclass(frozen=True)
class Level:
    """A value to compare a curve with, drawn as a dashed line across the charts of ``key`` (such as ``val/ce``)."""

    key: str
    label: str
    value: float


@dataclass(frozen=True)
class _Axis:
    """Maps values between ``low`` and ``high`` to pixels between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside the axis, about four to six of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**k for k in decades for d in digits if self.low <= d * 10.0**k <= self.high]
                if len(found) <= 6:
                    break
            return found
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        unit = power * min((m for m in (1, 2, 5, 10) if m * power >= rough), default=10)
        first, last = math.ceil(self.low / unit - 1e-9), math.floor(self.high / unit + 1e-9)
        return [k * unit for k in range(first, last + 1)]


def number(value: float) -> str:
    """Formats a number, with three digits if it is small: 1.72M, 43,100, 0.0820, 5.00e-05."""
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    for bound, suffix in ((1e9, "B"), (1e6, "M")):
        if size >= bound:
            return f"{value / bound:.3g}{suffix}"
    if size >= 99.95 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def percent(value: float) -> str:
    """Formats a share as a percentage: 0.0817 is 8.2%."""
    return f"{value:.1%}"


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    levels: Sequence[Level] = (),
    show: Callable[[float], str] = number,
    log: bool = False,
    from_zero: bool = False,
) -> str:
    """Draws curves over steps as one ``<svg>``. A long curve is a line of means over a pale band of extremes.

    An empty curve is not drawn but keeps its colour, so that a run has the same colour in all charts. At least one curve must
    have points. ``log`` uses a logarithmic axis if the values span more than a factor of ten.
    """
    values = np.concatenate([curve.values for curve in curves] + [np.array([level.value for level in levels])])
    low, high = float(values.min()), float(values.max())
    log = log and low > 0 and high > 10 * low
    if log:
        low, high = low / 1.1, high * 1.1
    else:
        pad = 0.06 * (high - low) or abs(high) / 2 or 1.0
        least, most = (0.0, 1.0) if show is percent and low >= 0 and high <= 1 else (-math.inf, math.inf)
        low, high = (0.0 if from_zero and low >= 0 else max(low - pad, least)), min(high + pad, most)
    x, y = _x_axis(curves), _Axis(low, high, _BOTTOM, _TOP, log)
    marks = []
    for index, curve in enumerate(curves):
        if not len(curve):
            continue
        style = f"s{index % SERIES + 1}"
        line = averages(curve)
        if len(line) < len(curve):
            marks.append(f'<polyline class="raw {style}" points="{_points(extremes(curve), x, y)}"/>')
        marks.append(f'<polyline class="line {style}" points="{_points(line, x, y)}"/>')
        if len(line) <= _FEW:
            pairs = zip(line.steps, line.values, strict=True)
            marks += [f'<circle class="dot {style}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.6"/>' for s, v in pairs]
    for level in levels:
        at = y(level.value)
        above = at - 5 if at > _TOP + 16 else at + 13
        marks.append(f'<line class="level" x1="{_LEFT}" x2="{_RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        text = f"{escape(level.label)} {show(level.value)}"
        marks.append(f'<text class="level-label" x="{_RIGHT - 2}" y="{above:.1f}" text-anchor="end">{text}</text>')
    return _svg(title, curves, _frame(x, y, show) + "".join(marks), show)


def area_chart(title: str, curves: Sequence[Curve], *, show: Callable[[float], str] = number) -> str:
    """Draws stacked curves over the same steps as one ``<svg>``; empty curves keep their colour."""
    short = [(index, averages(curve)) for index, curve in enumerate(curves) if len(curve)]
    tops = np.cumsum([curve.values for _, curve in short], axis=0)
    x, y = _x_axis(curves), _Axis(0.0, float(tops.max()) * 1.06 or 1.0, _BOTTOM, _TOP)
    areas = []
    floor = np.zeros_like(tops[0])
    for (index, curve), top in zip(short, tops, strict=True):
        outline = Curve("", np.r_[curve.steps, curve.steps[::-1]], np.r_[top, floor[::-1]])
        areas.append(f'<polygon class="area s{index % SERIES + 1}" points="{_points(outline, x, y)}"/>')
        floor = top
    return _svg(title, curves, _frame(x, y, show) + "".join(areas), show)


def _x_axis(curves: Sequence[Curve]) -> _Axis:
    first = min(curve.steps[0] for curve in curves if len(curve))
    last = max(curve.steps[-1] for curve in curves if len(curve))
    return _Axis(float(first), float(last) if last > first else float(first) + 1, _LEFT, _RIGHT)


def _points(curve: Curve, x: _Axis, y: _Axis) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(curve.steps, curve.values, strict=True))


def _frame(x: _Axis, y: _Axis, show: Callable[[float], str]) -> str:
    ticks = y.ticks()
    grid = [
        f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{_LEFT - 7}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{label}</text>'
        for tick, label in zip(ticks, _labels(ticks, show), strict=True)
    ]
    steps = [tick for tick in x.ticks() if tick == int(tick) and x(tick) > _LEFT + 12]
    grid += [f'<text x="{x(t):.1f}" y="{_BOTTOM + 17}" text-anchor="middle">{number(t)}</text>' for t in steps]
    grid.append(f'<text x="{_LEFT - 7}" y="{_BOTTOM + 17}" text-anchor="end">step</text>')
    return "".join(grid) + f'<line class="base" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>'


def _labels(ticks: Sequence[float], show: Callable[[float], str]) -> list[str]:
    """The ticks as text, with so many digits that no two are the same."""
    labels = [_ZEROS.sub(lambda found: found[1].rstrip("."), show(tick)) for tick in ticks]
    if len(set(labels)) < len(labels):
        digits = max(0, -math.floor(math.log10(min(b - a for a, b in pairwise(ticks)))))
        labels = [f"{tick:.{max(digits - 2, 0)}%}" if show is percent else f"{tick:,.{digits}f}" for tick in ticks]
    return labels


def _svg(title: str, curves: Sequence[Curve], body: str, show: Callable[[float], str]) -> str:
    ends = [f"{curve.label} from {show(curve.values[0])} to {show(curve.values[-1])}" for curve in curves if len(curve)]
    label = escape(f"{title} over steps: {', '.join(ends)}", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{body}</svg>'
