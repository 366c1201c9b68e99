"""What the models of a run hold on each rank after a step: parameters, gradients, optimizer; no activations.

Every pipeline stage is built by the run's own strategy on fake tensors and takes one step over tiny micro-batches, which
creates gradients and optimizer state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.models import ModelSource, model_outline, output_head
from limbeck.models.dtypes import compute_dtype, student_load_dtype
from limbeck.objectives import DistillationLoss, OutputHead
from limbeck.plan.micro_batch import full_micro_batch, make_micro_batch
from limbeck.plan.models import count_parameters, simulated_student, simulated_teacher
from limbeck.plan.tracker import held_bytes
from limbeck.strategies.base import MicroBatches, dims_of
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.teachers.signals import HIDDEN_STATES
from limbeck.train.build.student import prepare_student, with_recomputation
from limbeck.train.student import TrainInput

_TOKENS = 4  # per context-parallel rank


@dataclass(frozen=True)
class ModelMemory:
    """Memory of one role.

    parameters: of the model. per_stage: bytes that stay on the device of each rank, for each pipeline stage. loading: bytes of
    host memory of each process while it loads the whole model.
    """

    role: str
    ranks: int
    parameters: int
    per_stage: tuple[int, ...]
    loading: int
    dims: ParallelDims

    @property
    def per_rank(self) -> int:
        """Bytes of the rank that holds most."""
        return max(self.per_stage)

    def held_by(self, rank: int) -> int:
        """Bytes that stay on the device of ``rank``."""
        return self.per_stage[self.dims.coordinates(rank).pp]


def student_memory(config: DistillConfig) -> ModelMemory:
    """The memory of the student's ranks, without that of a colocated teacher.

    Raises:
        UnknownMemory: if sizes do not determine it.
        LimbeckError: if a model's configuration cannot be read, or its layout cannot run.
    """
    args, ranks = config.student.model_args, len(config.device_mapping or [0])
    dims = dims_of(config.student, ranks, "student")
    source = ModelSource.from_args(args, "student")
    model = prepare_student(config, model_outline(source, student_load_dtype(args)))
    stages = tuple(_student_stage(config, dims, ranks, dims.rank_at(pp=stage)) for stage in range(dims.pp))
    return ModelMemory("student", ranks, count_parameters(model), stages, _size(model), dims)


def teacher_memory(config: DistillConfig) -> ModelMemory:
    """The memory of the ranks of a teacher that is no service. Raises as ``student_memory``."""
    worker = config.teacher
    ranks = len((config.needs_worker_groups and worker.device_mapping) or config.device_mapping or [0])
    dims = dims_of(worker, ranks, "teacher")
    model = model_outline(ModelSource.from_args(worker.model_args, "teacher"), compute_dtype(worker))
    stages = []
    for stage in range(dims.pp):
        with simulated_teacher(config, ranks, dims.rank_at(pp=stage)) as teacher:
            stages.append(held_bytes(teacher.model.held_tensors()))
    return ModelMemory("teacher", ranks, count_parameters(model), tuple(stages), _size(model), dims)


def _student_stage(config: DistillConfig, dims: ParallelDims, ranks: int, rank: int) -> int:
    _, count = full_micro_batch(config, config.sequence_length)
    batch = make_micro_batch(1, _TOKENS * dims.cp, packed=config.student.use_sequence_packing)
    whole, own = batch.shard_for_context_parallel(dims.coordinates(rank).cp, dims.cp)
    config = with_recomputation(config, recompute=False)  # recomputing takes longer
    compares = bool(config.features.pairs)  # only projections of features depend on the teacher
    with simulated_student(config, ranks, rank, with_teacher=compares) as simulated:
        engine = simulated.student.engine
        root: Any = engine.root
        root.fused = _sum_of_inputs
        signal = (
            simulated.teacher.request(whole, HIDDEN_STATES)(whole)
            if compares and simulated.teacher is not None
            else None
        )
        inputs = [TrainInput(own, signal, 1.0)] * min(2, count)  # ZeRO-1 holds more gradients between micro-batches
        gradients = [
            held_bytes(engine.held_tensors()["gradients"])
            for _ in engine.forward_backward(MicroBatches(len(inputs), partial(iter, inputs)))
        ]
        gradients.append(held_bytes(engine.held_tensors()["gradients"]))
        engine.step()
        held = engine.held_tensors()
        state = held_bytes(held["parameters"]) + held_bytes(held["optimizer"])
        return state + max(gradients) + _received_head(config)


def _sum_of_inputs(hidden: Tensor, head: OutputHead, *_: Any, **__: Any) -> DistillationLoss:
    """A loss that gives all its inputs a gradient."""
    value = hidden.sum() + head.weight.sum() + (0 if head.bias is None else head.bias.sum())
    return DistillationLoss(value, *[value.detach()] * (len(DistillationLoss._fields) - 1))


def _received_head(config: DistillConfig) -> int:
    """Bytes of the output head that a teacher in other processes sends to each student rank."""
    worker = config.teacher
    if not config.needs_worker_groups or worker.service is not None or config.teacher_signal != "hidden_states":
        return 0
    model = model_outline(ModelSource.from_args(worker.model_args, "teacher"), compute_dtype(worker))
    return int(output_head(model).weight.nbytes)


def _size(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
