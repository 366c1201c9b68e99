"""The whole configuration of one run, checked."""

from __future__ import annotations

from pydantic import model_validator

from limbeck.config.schema.base import ContradictionError
from limbeck.config.schema.origin_objectives import distils
from limbeck.config.schema.rules import contradictions as contradictions_of
from limbeck.config.schema.run_fields import RunFields
from limbeck.config.schema.workers import WorkerConfig
from limbeck.folders import is_megatron_checkpoint


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
        self._name_megatron_tokenizers()
        contradictions = list(contradictions_of(self))
        if contradictions:
            raise ContradictionError(contradictions)
        return self

    def _name_megatron_tokenizers(self) -> None:
        """Set ``megatron_arguments.tokenizer_model`` to the run's tokenizer: checkpoints of Megatron-LM do not hold one, and
        the size of the vocabulary is known from it only.
        """
        for role in ("student", "teacher") if self.cross_tokenizer == "off" else ("student",):
            worker: WorkerConfig = getattr(self, role)
            args, name = (
                worker.model_args,
                self.tokenizer or self.student.model_args.megatron_arguments.get("tokenizer_model"),
            )
            of_megatron = is_megatron_checkpoint(args.model_name_or_path) or args.megatron_arguments
            if name is not None and of_megatron and "tokenizer_model" not in args.megatron_arguments:
                arguments = {**args.megatron_arguments, "tokenizer_model": name}
                args = args.model_copy(update={"megatron_arguments": arguments})
                object.__setattr__(self, role, worker.model_copy(update={"model_args": args}))

    @property
    def distils(self) -> bool:
        """Whether the objective of any sample has a distillation term."""
        return distils(self)
