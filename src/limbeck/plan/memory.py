"""What the models of a run take in memory, reckoned from their outlines: parameters, gradients, optimizer; no
activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import nn

from limbeck.config import DistillConfig
from limbeck.config.schema import WorkerConfig
from limbeck.models import ModelSource, body, model_outline, unwrap_model
from limbeck.models.dtypes import compute_dtype, student_load_dtype
from limbeck.strategies.base import dims_of, strategy_of
from limbeck.strategies.deepspeed import stage_of
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.pipeline_parallel import keep_stage
from limbeck.strategies.tensor_parallel import sliced_parameters
from limbeck.train.build.student import prepare_student

_MASTER, _GRADIENT, _MOMENTS = 4, 4, 8  # bytes of each trained number: float32, and Adam's two means


@dataclass(frozen=True)
class ModelMemory:
    """A group's need. parameters: of the model; per_stage: bytes that stay on the device of each rank, for each stage
    of the pipeline; loading: bytes of host memory in each process while it loads.
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


def model_memory(config: DistillConfig, roles: Collection[str] = ("student", "teacher")) -> list[ModelMemory]:
    """What ``roles`` take on each rank: parameters, and for what is trained gradients and Adam; nothing else.

    A teacher that is a service is not counted. Raises LimbeckError for a checkpoint whose configuration cannot be read.
    """
    loads = [_of_student(config)] if "student" in roles else []
    if "teacher" in roles and config.has_teacher and config.teacher.service is None:
        loads.append(_of_teacher(config))
    return loads


def _of_student(config: DistillConfig) -> ModelMemory:
    args, worker = config.student.model_args, config.student
    ranks = len(config.device_mapping or [0])
    dims = dims_of(worker, ranks, "student")
    source = ModelSource.from_args(args, "student")

    def make() -> Any:
        return prepare_student(config, model_outline(source, student_load_dtype(args)))

    zero = stage_of(worker.strategy_args.strategy_config.deepspeed)
    shards = dims.dp_shard * dims.cp

    def held(parameter: nn.Parameter) -> float:
        """Bytes of one number on each rank."""
        if not zero:
            each = _MASTER + _GRADIENT + _MOMENTS if parameter.requires_grad else parameter.element_size()
            return each / shards
        whole, shared = compute_dtype(worker).itemsize, 0
        if parameter.requires_grad:
            whole += _GRADIENT if zero == 1 else 0
            shared = _MASTER + _MOMENTS + (0 if zero == 1 else _GRADIENT)
        return (whole + shared) / ranks if zero == 3 else whole + shared / ranks

    model = make()
    stages = _stages(make, source, dims, "student", worker, lambda model, p, slices: p.numel() * held(p) / slices)
    return ModelMemory("student", ranks, _count(model), stages, _bytes(model.parameters()), dims)


def _of_teacher(config: DistillConfig) -> ModelMemory:
    worker = config.teacher
    ranks = len((config.needs_worker_groups and worker.device_mapping) or config.device_mapping or [0])
    dims = dims_of(worker, ranks, "teacher")
    source = ModelSource.from_args(worker.model_args, "teacher")
    share = dims.dp_shard * (dims.cp if dims.dp_shard > 1 else 1)

    def make() -> Any:
        return model_outline(source, compute_dtype(worker))

    model = make()
    head = model.get_output_embeddings().weight
    # Every rank keeps the head whole, also when the body is sharded.
    whole = head.numel() * head.element_size()

    def held(model: Any, parameter: nn.Parameter, slices: int) -> float:
        ends = (model.get_output_embeddings(), model.get_input_embeddings())
        is_head, is_embedding = (parameter is getattr(end, "weight", None) for end in ends)
        # The head is counted whole; where it is one with embeddings that are sharded, the shards are beside it.
        if is_head and not (is_embedding and share * slices > 1):
            return 0
        return parameter.numel() * parameter.element_size() / slices / share

    stages = tuple(part + whole for part in _stages(make, source, dims, "teacher", worker, held))
    return ModelMemory("teacher", ranks, _count(model), stages, _bytes(model.parameters()), dims)


def _stages(
    make: Callable[[], Any],
    source: ModelSource,
    dims: ParallelDims,
    role: str,
    worker: WorkerConfig,
    held: Callable[[Any, nn.Parameter, int], float],
) -> tuple[int, ...]:
    """The bytes of each pipeline stage, ``held(model, parameter, slices)`` being those of one parameter."""
    found = []
    for stage in range(dims.pp):
        model = make()
        causal, trunk = unwrap_model(model), body(model)
        strategy_of(worker, role).check_model(model, dims, source.name, role)
        if dims.pp > 1:
            keep_stage(causal, trunk, stage, dims.pp)
        sliced = {id(p) for p in sliced_parameters(causal, trunk, dims.tp)} if dims.tp > 1 else set()
        each = (held(causal, p, dims.tp if id(p) in sliced else 1) for p in model.parameters())
        found.append(ceil(sum(each)))
    return tuple(found)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
