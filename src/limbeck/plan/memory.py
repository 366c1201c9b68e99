"""What the models of a run take in memory, reckoned from their outlines: parameters, gradients, optimizer; no activations."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

from limbeck.config import DistillConfig
from limbeck.config.schema import ModelArgs, StudentModelArgs, WorkerConfig
from limbeck.errors import LimbeckError
from limbeck.models import add_lora, body, freeze, model_outline, unwrap_model
from limbeck.strategies.deepspeed import stage_of
from limbeck.strategies.fsdp2 import ranks_of_a_copy
from limbeck.strategies.parallel_dims import Layout
from limbeck.strategies.pipeline_parallel import check_stages, keep_stage
from limbeck.strategies.tensor_parallel import sliced_parameters
from limbeck.train.build.models import DTYPES, fsdp2_options, layout_of

_MASTER, _GRADIENT, _MOMENTS = 4, 4, 8  # bytes of each trained number: float32, and Adam's two means


@dataclass(frozen=True)
class ModelMemory:
    """A group's need. parameters: of the model; per_stage: bytes that stay on the device of each rank, for each stage of the
    pipeline; loading: bytes of host memory in each process while it loads."""

    role: str
    ranks: int
    parameters: int
    per_stage: tuple[int, ...]
    loading: int
    layout: Layout

    @property
    def per_rank(self) -> int:
        """Bytes of the rank that holds most."""
        return max(self.per_stage)

    def held_by(self, rank: int) -> int:
        """Bytes that stay on the device of ``rank``."""
        return self.per_stage[rank // (self.layout.tensor * self.layout.context) % self.layout.pipeline]


def model_memory(config: DistillConfig, roles: Collection[str] = ("student", "teacher")) -> list[ModelMemory]:
    """What ``roles`` take on each rank: parameters, and for what is trained gradients and Adam; nothing else.

    A teacher that is a service is not counted. Raises LimbeckError for a checkpoint whose configuration cannot be read.
    """
    loads = [_of_student(config)] if "student" in roles else []
    if "teacher" in roles and config.has_teacher and config.teacher.service is None:
        loads.append(_of_teacher(config))
    return loads


def outline(args: ModelArgs | StudentModelArgs, dtype: torch.dtype, role: str) -> Any:
    """The model that ``args`` name, without numbers."""
    return model_outline(
        args.model_name_or_path,
        dtype=dtype,
        config_kwargs=args.model_config_kwargs,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        role=role,
    )


def _of_student(config: DistillConfig) -> ModelMemory:
    args, worker = config.student.model_args, config.student
    layout, ranks = layout_of(worker), len(config.device_mapping or [0])

    def make() -> Any:
        model = outline(args, DTYPES[args.dtype] if args.lora_target else torch.float32, "student")
        if args.lora_target:
            model = add_lora(
                model, target=args.lora_target, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout,
                additional_target=args.additional_target,
            )  # fmt: skip
        elif args.freeze_module_prefix:
            freeze(model, [prefix.strip() for prefix in args.freeze_module_prefix.split(",")])
        return model

    zero = stage_of(worker.strategy_args.strategy_config.deepspeed)
    share = _share(worker, layout, ranks)

    def held(parameter: nn.Parameter) -> float:
        """Bytes of one number on each rank."""
        if not zero:
            each = _MASTER + _GRADIENT + _MOMENTS if parameter.requires_grad else parameter.element_size()
            return each / share
        computed = DTYPES[worker.strategy_args.strategy_config.param_dtype or args.dtype].itemsize
        whole, shared = computed, 0
        if parameter.requires_grad:
            whole += _GRADIENT if zero == 1 else 0
            shared = _MASTER + _MOMENTS + (0 if zero == 1 else _GRADIENT)
        return (whole + shared) / ranks if zero == 3 else whole + shared / ranks

    model = make()
    stages = _stages("student", worker, make, lambda model, p, slices: p.numel() * held(p) / slices)
    return ModelMemory("student", ranks, _count(model), stages, _bytes(model.parameters()), layout)


def _of_teacher(config: DistillConfig) -> ModelMemory:
    worker = config.teacher
    layout = layout_of(worker)
    dtype = DTYPES[worker.strategy_args.strategy_config.param_dtype or worker.model_args.dtype]
    ranks = len((config.needs_worker_groups and worker.device_mapping) or config.device_mapping or [0])
    alone = worker.strategy_args.strategy_name == "hf_infer" or ranks == 1
    share = 1 if alone else _share(worker, layout, ranks)

    def make() -> Any:
        return outline(worker.model_args, dtype, "teacher")

    model = make()
    head = model.get_output_embeddings().weight
    # Every rank keeps the head whole, also when the body is spread.
    whole = head.numel() * head.element_size()

    def held(model: Any, parameter: nn.Parameter, slices: int) -> float:
        ends = (model.get_output_embeddings(), model.get_input_embeddings())
        is_head, is_embedding = (parameter is getattr(end, "weight", None) for end in ends)
        # The head is counted whole; where it is one with embeddings that are sharded, the shards are beside it.
        if is_head and not (is_embedding and share * slices > 1):
            return 0
        return parameter.numel() * parameter.element_size() / slices / share

    stages = tuple(part + whole for part in _stages("teacher", worker, make, held))
    return ModelMemory("teacher", ranks, _count(model), stages, _bytes(model.parameters()), layout)


def _stages(
    role: str, worker: WorkerConfig, make: Callable[[], Any], held: Callable[[Any, nn.Parameter, int], float]
) -> tuple[int, ...]:
    """The bytes of each stage of the pipeline, ``held(model, parameter, slices)`` being those of one parameter."""
    layout, name = layout_of(worker), str(worker.model_args.model_name_or_path or role)
    found = []
    for number in range(layout.pipeline):
        model = make()
        causal, trunk = unwrap_model(model), body(model)
        if layout.pipeline > 1:
            check_stages(trunk, layout.pipeline, name, role)
            keep_stage(causal, trunk, number, layout.pipeline)
        sliced = {id(p) for p in sliced_parameters(causal, trunk, layout.tensor)} if layout.tensor > 1 else set()
        each = (held(causal, p, layout.tensor if id(p) in sliced else 1) for p in model.parameters())
        found.append(ceil(sum(each)))
    return tuple(found)


def _share(worker: WorkerConfig, layout: Layout, ranks: int) -> int:
    """Over how many ranks what is left of a slice and a stage is sharded."""
    others = max(1, ranks // (layout.tensor * layout.pipeline))
    try:
        return ranks_of_a_copy(others, fsdp2_options(worker, torch.float32), layout.tensor)
    except LimbeckError:  # a layout that is refused elsewhere has no share
        return 1


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
