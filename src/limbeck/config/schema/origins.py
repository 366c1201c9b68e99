"""The sections for the objectives of on-policy samples by their origin: who wrote the answer."""

from __future__ import annotations

from pydantic import Field

from limbeck.config.schema.base import Section
from limbeck.config.schema.objective import Objective

ORIGINS = ("student", "dataset", "teacher", "replay")
"""Who wrote the answer of a sample; ``replay`` is the student in an earlier step."""


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
