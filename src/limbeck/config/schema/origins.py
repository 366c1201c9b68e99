"""Objectives of on-policy samples by their origin: who wrote the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from limbeck.config.schema.base import Section
from limbeck.config.schema.objective import Objective

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields

ORIGINS = ("student", "dataset", "teacher", "replay")
"""Who wrote the answer of a sample; ``replay`` is the student in an earlier step."""

_WRITTEN_BY_THE_STUDENT = ("student", "replay")

Config = TypeVar("Config", bound="RunFields")


class OriginObjective(Section):
    """The objective of the samples of one origin. Unset keys have the values of the run."""

    kd_objective: Objective | None = Field(default=None, description="As the run's key of this name.")
    kd_objective_kwargs: dict[str, float | str] | None = Field(
        default=None,
        description="As the run's key of this name. If unset and kd_objective differs from the run's, empty.",
    )
    kd_temperature: float | None = Field(default=None, gt=0, description="As the run's key of this name.")
    teacher_temperature: float | None = Field(default=None, gt=0, description="As the run's key of this name.")
    temperature_squared: bool | None = Field(default=None, description="As the run's key of this name.")
    adaptive_kl_alpha: float | None = Field(default=None, ge=0, le=1, description="As the run's key of this name.")
    skew_lambda: float | None = Field(default=None, ge=0, lt=1, description="As the run's key of this name.")
    js_beta: float | None = Field(default=None, ge=0, le=1, description="As the run's key of this name.")
    distill_loss_weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="As the run's key of this name. For answers of the student (student, replay) it is 1 and cannot be set to "
        "less, because they are not to be imitated.",
    )
    weight: float | None = Field(
        default=None,
        ge=0,
        description="Multiplies the loss of each token of these samples; the loss is divided by the sum of all weights. If "
        "unset, 1.",
    )


class OriginObjectives(Section):
    """The objectives of all origins."""

    student: OriginObjective = Field(default_factory=OriginObjective, description="Of answers of the student.")
    dataset: OriginObjective = Field(default_factory=OriginObjective, description="Of answers of the data.")
    teacher: OriginObjective = Field(default_factory=OriginObjective, description="Of answers of the teacher.")
    replay: OriginObjective = Field(
        default_factory=OriginObjective,
        description="Of answers that the student wrote in an earlier step. Unset keys have the values of student.",
    )


def for_origin(config: Config, origin: str) -> Config:
    """``config`` with the keys of the objective as they are for the samples of ``origin``."""
    changes: dict[str, Any] = {}
    for section in _sections(config, origin):
        given = {key: value for key, value in section if value is not None and key != "weight"}
        current = changes.get("kd_objective", config.kd_objective)
        if given.get("kd_objective", current) != current:
            changes["kd_objective_kwargs"] = {}
        changes |= given
    if origin in _WRITTEN_BY_THE_STUDENT:
        changes["distill_loss_weight"] = 1.0
    return config.model_copy(update=changes)


def weight_of_origin(config: RunFields, origin: str) -> float:
    """The factor of the loss of the samples of ``origin``."""
    given = [section.weight for section in _sections(config, origin) if section.weight is not None]
    return given[-1] if given else 1.0


def objective_key(config: RunFields) -> tuple[Any, ...]:
    """What the objective of ``config`` depends on, of the keys that can differ between origins; it can be compared."""
    keys = (key for key in OriginObjective.model_fields if key != "weight")
    return tuple(
        tuple(sorted(value.items())) if isinstance(value := getattr(config, key), dict) else value for key in keys
    )


def objectives_by_origin(config: Config) -> dict[str, Config]:
    """``config`` for each origin that the run has, if they do not all have the objective of the run; otherwise empty."""
    if config.rollout is None or config.effective_step_source != "rollout":
        return {}
    found = {origin: for_origin(config, origin) for origin in config.rollout.origins}
    return found if any(objective_key(one) != objective_key(config) for one in found.values()) else {}


def _sections(config: RunFields, origin: str) -> list[OriginObjective]:
    """The sections that set the objective of ``origin``; later ones replace earlier ones."""
    assert config.rollout is not None
    names = ("student", "replay") if origin == "replay" else (origin,)
    return [getattr(config.rollout.objectives, name) for name in names]
