"""The student's own weights as the teacher: those of the start of the run, or their average over the steps.

The average is that of Tarvainen and Valpola (2017), "Mean teachers are better role models" (https://arxiv.org/abs/1703.01780).
No second checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from limbeck.config import DistillConfig
from limbeck.config.schema import ModelArgs
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, body, model_outline
from limbeck.models.dtypes import compute_dtype
from limbeck.strategies.base import FrozenModel
from limbeck.strategies.state import shard_like
from limbeck.teachers.local import LocalTeacher, load_teacher
from limbeck.teachers.protocol import TeacherContext


class Target(NamedTuple):
    """Where a weight of the student is in the teacher: its name in the body, and ``weight`` or ``bias`` of the output head;
    None where it is not.
    """

    in_body: str | None
    in_head: str | None


class AveragedTeacher(LocalTeacher):
    """A teacher whose weights are a moving average of the student's: average ← decay · average + (1 − decay) · student.

    The averages are in float32 and sharded as the teacher is; those of the output head are whole on every rank, as the head is.

    Args:
        model: the student's model, distributed as a teacher without model parallelism.
        targets: where each of the student's weights is, by its name in ``Engine.iter_weights``.
        decay: of the average, from 0 to 1.
    """

    def __init__(self, model: FrozenModel, targets: Mapping[str, Target], decay: float) -> None:
        super().__init__(model)
        self._targets, self._decay = targets, decay
        self._averages: dict[str, Tensor] = {}

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """The averages by the student's names, each sharded or whole; with ``load`` a run continues from them exactly."""
        return self._averages

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Add the student's weights after a step. Collective."""
        self._add(weights, self._decay)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the averages by ``weights``, whole on every rank. Collective.

        Raises:
            LimbeckError: if there is not one for each weight of the teacher.
        """
        self._averages = {}
        self._add(weights, 0.0)
        if missing := self._targets.keys() - self._averages.keys():
            raise LimbeckError(
                f"the average of the student's weights lacks {min(missing)}; use the student of the run."
            )

    @torch.no_grad()
    def _add(self, weights: Iterable[tuple[str, Tensor]], decay: float) -> None:
        for module in self.model.body.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what the last forward pass has left gathered would hide the shards
        parameters = dict(self.model.body.named_parameters())
        head = self.model.head
        for name, weight in weights:
            if name not in self._targets:  # a buffer, or a second name of a tied weight
                continue
            target = self._targets[name]
            parameter = None if target.in_body is None else parameters[target.in_body]
            of_head = None if target.in_head is None else getattr(head, target.in_head)
            like = parameter if of_head is None else of_head
            assert like is not None
            new = shard_like(weight.to(like.device, torch.float32), like)
            average = self._averages.setdefault(name, new.clone())
            _local(average).lerp_(_local(new), 1 - decay)
            if parameter is not None:
                _local(parameter).copy_(_local(average if of_head is None else shard_like(average, parameter)))
            if of_head is not None:
                of_head.copy_(average)


def load_initial(context: TeacherContext) -> LocalTeacher:
    """The student as it is before the first step, frozen (``teacher.source: student_initial``).

    Raises:
        LimbeckError: if the student is a new model.
    """
    if context.config.student.model_args.from_scratch:
        raise LimbeckError(
            "teacher.source = student_initial is a copy of the student before the first step, and with "
            "student.model_args.from_scratch that is random; use a checkpoint, or student_average."
        )
    return load_teacher(replace(context, config=_with_own_model(context.config)))


def load_averaged(context: TeacherContext) -> AveragedTeacher:
    """The moving average of the student's weights (``teacher.source: student_average``)."""
    config = _with_own_model(context.config)
    model = load_teacher(replace(context, config=config)).model
    outline = model_outline(ModelSource.from_args(config.teacher.model_args, "student"), compute_dtype(config.teacher))
    of_body = {id(parameter): name for name, parameter in body(outline).named_parameters()}
    head = outline.get_output_embeddings()
    of_head = {id(parameter): name for name, parameter in head.named_parameters()}
    found = {name: id(parameter) for name, parameter in outline.named_parameters()}
    targets = {
        name: Target(of_body.get(number), of_head.get(number))
        for name, number in found.items()
        if number in of_body or number in of_head
    }
    return AveragedTeacher(model, targets, float(config.teacher.source_kwargs.get("decay", 0.999)))


def _with_own_model(config: DistillConfig) -> DistillConfig:
    """``config`` whose teacher has the student's checkpoint, in the precision in which the student computes."""
    args = config.student.model_args
    own = ModelArgs(**{key: getattr(args, key) for key in ModelArgs.model_fields})
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"model_args": own})})


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
