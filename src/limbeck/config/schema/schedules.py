"""Shares of samples that change during a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from limbeck.config.schema.base import Section


class FractionSchedule(Section):
    """A share that changes from ``start`` to ``end`` over ``steps`` steps, or over a ``share`` of the run, and then stays."""

    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)
    steps: int | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0, le=1)
    shape: Literal["linear", "cosine"] = "linear"

    @model_validator(mode="after")
    def _check_length(self) -> FractionSchedule:
        if (self.steps is None) == (self.share is None):
            raise ValueError("needs either steps or share")
        return self

    def at(self, step: int, total_steps: int) -> float:
        """The share in ``step``, counted from 0, of a run of ``total_steps``."""
        length = self.steps if self.steps is not None else (self.share or 1.0) * total_steps
        done = min(step / length, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


class AdaptiveSchedule(Section):
    """A share that grows by ``increment`` up to ``end`` at each validation whose ``metric`` is at least ``tolerance`` above the
    reference: that of the first validation, later that of the last increase.

    Ko et al. (2024), "DistiLLM" (https://arxiv.org/abs/2402.03898).
    """

    shape: Literal["adaptive"]
    start: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)
    increment: float = Field(default=0.1, gt=0, le=1)
    tolerance: float = 0.0
    metric: Literal["val/loss", "val/ce", "val/kd"] = "val/loss"

    @model_validator(mode="after")
    def _check_order(self) -> AdaptiveSchedule:
        if self.end < self.start:
            raise ValueError("end must not be below start")
        return self


def schedule_of(value: float | Mapping[str, Any]) -> FractionSchedule | AdaptiveSchedule:
    """A share as a schedule. Raises pydantic's ValidationError."""
    given = dict(value) if isinstance(value, Mapping) else {"start": value, "end": value, "steps": 1}
    kind = AdaptiveSchedule if given.get("shape") == "adaptive" else FractionSchedule
    return kind.model_validate(given)


def _known_fraction(value: float | dict[str, float | str]) -> float | dict[str, float | str]:
    try:
        schedule_of(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"]) if isinstance(value, dict) else ""
        reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise ValueError(
            f"must be a number from 0 to 1, or a schedule {{start, end, steps or share, shape}} ({where}{reason})"
        ) from error
    return value


def _no_adaptive(value: float | dict[str, float | str]) -> float | dict[str, float | str]:
    if isinstance(schedule_of(value), AdaptiveSchedule):
        raise ValueError("must be a number from 0 to 1, or a schedule with the shape linear or cosine")
    return value


OnPolicyFraction = Annotated[float | dict[str, float | str], AfterValidator(_known_fraction)]
Fraction = Annotated[OnPolicyFraction, AfterValidator(_no_adaptive)]
