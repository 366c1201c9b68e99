"""The whole configuration of one run, checked."""

from __future__ import annotations

from pydantic import model_validator

from limbeck.config.schema.base import ContradictionError
from limbeck.config.schema.origin_objectives import distils
from limbeck.config.schema.rules import contradictions as contradictions_of
from limbeck.config.schema.run_fields import RunFields
from limbeck.config.schema.workers import WorkerConfig


class DistillConfig(RunFields):
    """One run. Required are a student, a data file and, unless `distill_loss_weight` is 0, a teacher."""

    @model_validator(mode="after")
    def _check_contradictions(self) -> DistillConfig:
        for role, pretrain in (("student", self.student_pretrain), ("teacher", self.teacher_pretrain)):
            worker: WorkerConfig = getattr(self, role)
            if pretrain is not None and worker.model_args.model_name_or_path is None:
                model_args = worker.model_args.model_copy(update={"model_name_or_path": pretrain})
                # Sections are frozen, but this one is still under construction.
                object.__setattr__(self, role, worker.model_copy(update={"model_args": model_args}))
        contradictions = list(contradictions_of(self))
        if contradictions:
            raise ContradictionError(contradictions)
        return self

    @property
    def distils(self) -> bool:
        """Whether the objective of any sample has a distillation term."""
        return distils(self)
