"""FSDP2: parameters, gradients and optimizer state sharded over the processes by PyTorch's ``fully_shard``.

Applied from outside, layer by layer and then to the root, after model parallelism. A process that is alone has nothing
to shard and nothing is wrapped. Registered as ``fsdp2_train`` and ``fsdp2_infer``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from limbeck.config import DistillConfig
from limbeck.config.schema import StrategyConfig, WorkerConfig
from limbeck.errors import LimbeckError, UnknownMemory
from limbeck.models import body, compile_layers, decoder_layers, output_head
from limbeck.models.dtypes import DTYPES, compute_dtype
from limbeck.strategies.base import Engine, FrozenModel, LibraryFunctions, Placement, StudentSpec, TeacherSpec
from limbeck.strategies.model_parallel import (
    apply_model_parallel,
    check_model_parallel,
    model_parallel_group,
    outline_of,
    pipeline_of,
)
from limbeck.strategies.optimizer import check_optimizer, make_optimizer
from limbeck.strategies.parallel_dims import TP, ParallelDims
from limbeck.strategies.parameter_offload import copy_in_forward, keep_on_host
from limbeck.strategies.pipeline_engine import PipelineEngine
from limbeck.strategies.torch_engine import TorchEngine
from limbeck.strategies.world import World

M = TypeVar("M", bound=nn.Module)


class Fsdp2Strategy:
    """Shards models with ``fully_shard``, also what tensor, context and pipeline parallelism leave to a rank."""

    shards = True

    def dims(self, worker: WorkerConfig, ranks: int, role: str) -> ParallelDims:
        return ParallelDims.from_config(worker.strategy_args.strategy_config, ranks, role, shard=self.shards)

    def check(self, config: DistillConfig, dims: ParallelDims, role: str, device_type: str) -> None:
        args = config.student.model_args
        if config.compile_model is True and dims.sequence_parallel:
            raise LimbeckError(
                f"compile_model = true with {role}.strategy_args.strategy_config.sequence_parallel is not built yet; set "
                "one of them to false."
            )
        if config.features.pairs and dims.model_parallel_size > 1:
            raise LimbeckError(
                f"features.pairs with {role}.strategy_args.strategy_config: {dims.describe()} is not built with FSDP2; set all "
                "sizes to 1, or use megatron_train and megatron_infer."
            )
        if role == "student" and args.dtype == "fp16" and dims.size > 1:
            raise LimbeckError(
                "student.model_args.dtype = fp16 trains on several ranks with deepspeed_train and megatron_train only; use one "
                "of these, or bf16."
            )
        if role == "student":
            if config.student.strategy_args.strategy_config.offload_policy and dims.size == 1:
                raise LimbeckError(
                    "student.strategy_args.strategy_config.offload_policy = true needs several processes, over which FSDP "
                    "shards it; use more devices, or set it to false."
                )
            check_optimizer(config.student.training_args.optimizer_name, dims)
            for size, kind in ((dims.tp, "tensor"), (dims.pp, "pipeline")):
                if args.lora_target and size > 1:
                    raise LimbeckError(
                        f"student.strategy_args.strategy_config.{kind}_model_parallel_size = {size} with lora_target is not "
                        "built yet; use 1, and FSDP2 shards the model all the same."
                    )

    def check_model(self, model: Any, dims: ParallelDims, name: str, role: str) -> None:
        check_model_parallel(model, dims, name, role)

    @contextmanager
    def simulate(self, worker: WorkerConfig, role: str) -> Iterator[LibraryFunctions]:
        if role == "student" and worker.training_args.optimizer_name == "adamw_8bit":  # type: ignore[attr-defined]
            raise UnknownMemory(
                "student.training_args.optimizer_name = adamw_8bit: limbeck plan does not know the size of torchao's moments; "
                "plan with adamw, which has 4 times the moments."
            )
        if role == "student" and worker.strategy_args.strategy_config.offload_policy:
            raise UnknownMemory(
                "student.strategy_args.strategy_config.offload_policy = true: limbeck plan does not know what a student in "
                "host memory needs on a GPU; plan without it, which needs more."
            )
        # Private modules, and needed by a plan only.
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle

        yield [
            (FSDPState, "_pre_forward"),
            (FSDPState, "_post_forward"),
            (FSDPState, "_pre_backward"),
            (FSDPState, "_root_post_backward_final_callback"),
            (FSDPParamGroup, "post_backward"),
            (PipelineScheduleSingle, "step"),
        ]

    def build_student(self, spec: StudentSpec, world: World) -> Engine:
        model, dims, given = spec.model, world.dims, spec.worker.strategy_args.strategy_config
        outline, rows = outline_of(model), output_head(model).weight.shape[0]
        reduce_partial = apply_model_parallel(model, dims, world, spec.name, verify=spec.verify)
        pipeline = pipeline_of(dims, world)
        if pipeline is not None and world.max(not any(p.requires_grad for p in model.parameters())):
            raise LimbeckError(
                f"student.strategy_args.strategy_config.pipeline_model_parallel_size = {dims.pp}: one of the "
                "stages has only frozen parameters and nothing to train; use fewer stages, or freeze less."
            )
        root = spec.make_root(Placement(outline, rows, world.group(TP), pipeline))
        root.train()
        if spec.compiled and not dims.sequence_parallel:
            compile_layers(decoder_layers(model))
        dtype = _param_dtype(spec.worker)
        # Sharding moves layer by layer, so no device ever holds the whole model; the rest follows.
        root = shard(root, decoder_layers(model), world, dims, given, dtype)
        if given.offload_policy:
            keep_on_host(root, root.parameters(), world.device)
        else:
            move(root, world.device)
        optimizer = make_optimizer(root, spec.worker.training_args)
        options: dict[str, Any] = {
            "max_norm": spec.config.max_grad_norm,
            "reduce_partial_gradients": reduce_partial,
        }
        if pipeline is None:
            return TorchEngine(root, optimizer, world, compute_dtype=dtype, **options)
        return PipelineEngine(
            root,  # type: ignore[arg-type]
            optimizer,
            world,
            pipeline,
            outline,
            message_dtype=dtype or torch.float32,
            **options,
        )

    def build_teacher(self, spec: TeacherSpec, world: World) -> FrozenModel:
        model, given = spec.model, spec.worker.strategy_args.strategy_config
        dims = self.dims(spec.worker, world.size, "teacher")
        frozen = freeze_for_inference(model, world)
        apply_model_parallel(model, dims, world, spec.name, verify=spec.verify)
        layers = decoder_layers(frozen.body)
        if self.shards:
            shard(frozen.body, layers, world, dims, given, _param_dtype(spec.worker))
        if not given.offload_policy:
            move(frozen.body, world.device)
        elif self.shards and world.size > 1:  # fully_shard copies what it gathers
            frozen.offloaded = keep_on_host(frozen.body, frozen.body.parameters(), world.device)
        else:
            frozen.offloaded = copy_in_forward(frozen.body, layers, world.device)
        frozen.group = model_parallel_group(dims, world)
        frozen.can_compile = not dims.sequence_parallel and not given.offload_policy
        return frozen


def shard(
    root: M,
    layers: Sequence[nn.Module],
    world: World,
    dims: ParallelDims,
    given: StrategyConfig,
    param_dtype: torch.dtype | None,
) -> M:
    """``root`` with each of ``layers`` and the rest of it sharded in place; unchanged if the process is alone.

    Args:
        param_dtype: what layers compute in; None keeps the parameters' own precision.
    """
    if world.size == 1:
        return root
    mesh = dims.fsdp_mesh(world.device.type, replicate=given.replicate)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=DTYPES[given.reduce_dtype])
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    if given.offload_policy:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    reshard = True if given.reshard_after_forward is None else given.reshard_after_forward
    for layer in layers:
        fully_shard(layer, reshard_after_forward=reshard, **options)
    # The loss reads the output head inside the root's forward, so the root's own parameters stay gathered until
    # backward.
    fully_shard(root, reshard_after_forward=False, **options)
    return root


def reshard(root: nn.Module) -> None:
    """Free what forward passes without a backward pass have left gathered of ``root``."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def freeze_for_inference(model: Any, world: World) -> FrozenModel:
    """The frozen body of ``model`` and its output head, which is sent once and therefore whole on every rank."""
    head = output_head(model)
    bias = None if head.bias is None else head.bias.detach().to(world.device)
    head = replace(head, weight=head.weight.detach().to(world.device), bias=bias)
    size = sum(parameter.numel() for parameter in model.parameters())
    return FrozenModel(body(model).requires_grad_(False), head, size)


def move(module: M, device: torch.device) -> M:
    """``module`` on ``device``. On a CPU nothing moves: a plan's parameters cannot."""
    return module if device.type == "cpu" else module.to(device)


def _param_dtype(worker: WorkerConfig) -> torch.dtype | None:
    """The precision of the layers where it is not float32."""
    dtype = compute_dtype(worker)
    return None if dtype is torch.float32 else dtype


STRATEGY = Fsdp2Strategy()
