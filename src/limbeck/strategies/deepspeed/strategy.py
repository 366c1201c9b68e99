"""The strategies ``deepspeed_train`` and ``deepspeed_infer``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from limbeck.config import DistillConfig
from limbeck.config.schema import WorkerConfig
from limbeck.errors import LimbeckError, UnknownMemory
from limbeck.models import compile_layers, decoder_layers, output_head
from limbeck.models.dtypes import compute_dtype
from limbeck.strategies.base import (
    Engine,
    FrozenModel,
    LibraryFunctions,
    Placement,
    StudentSpec,
    TeacherSpec,
)
from limbeck.strategies.deepspeed.engine import ZeroEngine
from limbeck.strategies.deepspeed.library import (
    configuration,
    first_line,
    import_deepspeed,
    initialize,
    leave_process_group,
    load_deepspeed,
    offload_device,
    stage_of,
)
from limbeck.strategies.fsdp2 import freeze_for_inference
from limbeck.strategies.model_parallel import outline_of
from limbeck.strategies.optimizer import check_optimizer, make_optimizer
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.world import World


def make_adamw(
    groups: Iterable[dict[str, Any]], block: Mapping[str, Any], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW as a block needs it: DeepSpeed's own on the CPU when it offloads the optimizer, else PyTorch's.

    Raises LimbeckError when the former cannot be built on this machine.
    """
    forced = block.get("zero_force_ds_cpu_optimizer", True)
    if offload_device(block, "optimizer") is None or not forced:
        return torch.optim.AdamW(list(groups), lr=lr, betas=betas, eps=eps, fused=True)
    load_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # a compiler that is missing, too old or failing: each has an exception of its own
        raise LimbeckError(
            "strategy_config.zero_optimization.offload_optimizer steps with DeepSpeed's CPU Adam, which cannot be compiled "
            f"here ({first_line(error)}); install a C++ compiler, or set strategy_config.zero_force_ds_cpu_optimizer: "
            "false to step with PyTorch's AdamW."
        ) from error
    made: torch.optim.Optimizer = DeepSpeedCPUAdam(list(groups), lr=lr, betas=betas, eps=eps, adamw_mode=True)
    return made


class DeepSpeedStrategy:
    """Hands models to DeepSpeed, which shards and steps them."""

    def dims(self, worker: WorkerConfig, ranks: int, role: str) -> ParallelDims:
        return ParallelDims.from_config(worker.strategy_args.strategy_config, ranks, role)

    def check(self, config: DistillConfig, dims: ParallelDims, role: str, device_type: str) -> None:
        import_deepspeed()
        if role == "student":
            check_optimizer(config.student.training_args.optimizer_name, dims, deepspeed=True)
        if dims.model_parallel_size > 1:
            raise LimbeckError(
                f"{role}.strategy_args.strategy_config: {dims.describe()} with DeepSpeed is not built; use fsdp2_train and "
                "fsdp2_infer."
            )
        block = (config.student if role == "student" else config.teacher).strategy_args.strategy_config.deepspeed
        if config.compile_model is True and stage_of(block) == 3:
            raise LimbeckError(
                f"compile_model = true with {role}.strategy_args.strategy_config.zero_optimization.stage = 3, which gathers "
                "parameters inside the layers, is not built; use stage 2 or FSDP2, or set compile_model: auto."
            )

    def check_model(self, model: Any, dims: ParallelDims, name: str, role: str) -> None:
        """DeepSpeed shards any model."""

    @contextmanager
    def simulate(self, worker: WorkerConfig, role: str) -> Iterator[LibraryFunctions]:
        for what in ("optimizer", "param"):
            if offload_device(worker.strategy_args.strategy_config.deepspeed, what) is not None:
                raise UnknownMemory(
                    f"{role}.strategy_args.strategy_config.zero_optimization.offload_{what}: sizes alone do not determine "
                    "what DeepSpeed then leaves on a GPU; plan without it."
                )
        deepspeed = import_deepspeed()
        from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        with ExitStack() as stack:
            # Left behind, it would make accelerate take a later Trainer for one of several ranks.
            stack.enter_context(patch.dict(os.environ, LOCAL_RANK="0"))
            load_deepspeed()
            for module in (partition_parameters, partitioned_param_coordinator, stage3):
                stack.enter_context(patch.object(module, "assert_ints_same_as_other_ranks", lambda ints: None))
            stack.callback(leave_process_group)
            in_optimizer = ("update_hook_state_and_maybe_run_epilogue", "reenter_backward_if_needed")
            optimizers = (DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3)
            yield [
                *((deepspeed.DeepSpeedEngine, name) for name in ("forward", "backward", "step")),
                *(
                    (DeepSpeedZeRoOffload, f"{when}_sub_module_{pass_name}_function")
                    for when in ("pre", "post")
                    for pass_name in ("forward", "backward")
                ),
                *((optimizer, name) for optimizer in optimizers for name in in_optimizer),
                (DeepSpeedZeroOptimizer, "process_gradients"),
                (stage3.DeepSpeedZeroOptimizer_Stage3, "reduce_ready_partitions_and_remove_grads"),
            ]

    def build_student(self, spec: StudentSpec, world: World) -> Engine:
        block, training = spec.worker.strategy_args.strategy_config.deepspeed, spec.worker.training_args
        root = spec.make_root(Placement(outline_of(spec.model), output_head(spec.model).weight.shape[0]))
        root.train()
        if spec.compiled and stage_of(block) < 3:  # stage 3 gathers parameters in hooks inside the layers
            compile_layers(decoder_layers(spec.model))
        dtype = compute_dtype(spec.worker)
        return ZeroEngine(
            root,
            make_optimizer(root, training, partial(make_adamw, block=block)),
            world,
            block,
            compute_dtype=None if dtype is torch.float32 else dtype,
            max_norm=spec.config.max_grad_norm,
            accumulates=training.gradient_accumulation_steps > 1 or spec.worker.use_dynamic_batching_in_train,
        )

    def build_teacher(self, spec: TeacherSpec, world: World) -> FrozenModel:
        frozen = freeze_for_inference(spec.model, world)
        block, dtype = spec.worker.strategy_args.strategy_config.deepspeed, compute_dtype(spec.worker)
        # ZeRO-3 in place: its hooks gather each layer where it runs.
        initialize(frozen.body, configuration(block, dtype), world, dtype, None)
        frozen.can_compile = stage_of(block) < 3
        return frozen


STRATEGY = DeepSpeedStrategy()
