"""DeepSpeed ZeRO stages 1, 2 and 3, by DeepSpeed itself. Registered as ``deepspeed_train`` and ``deepspeed_infer``.

DeepSpeed keeps float32 masters and moments in flat pieces, one per rank. Here these are boxes of whole tensors under plain
names, so a checkpoint is the same as any other strategy's and resumes on another stage or number of ranks.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from limbeck.config import DistillConfig
from limbeck.config.schema import WorkerConfig
from limbeck.errors import LimbeckError, UnknownMemory
from limbeck.models import compile_layers, decoder_layers, output_head
from limbeck.models.dtypes import compute_dtype
from limbeck.strategies.base import (
    MODEL,
    Engine,
    EngineState,
    FrozenModel,
    LibraryFunctions,
    MicroBatches,
    Placement,
    StudentSpec,
    TeacherSpec,
)
from limbeck.strategies.fsdp2 import freeze_for_inference
from limbeck.strategies.model_parallel import outline_of
from limbeck.strategies.optimizer import check_optimizer, make_optimizer
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.shards import Shard, Sliceable, flat_boxes, shard_of, whole_box
from limbeck.strategies.world import World

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def stage_of(block: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed block; 0 (no sharding) if it sets none."""
    return int(block.get("zero_optimization", {}).get("stage", 0))


def offload_device(block: Mapping[str, Any], what: str) -> str | None:
    """Where a block keeps its ``optimizer`` or ``param`` outside the accelerator: ``cpu``, ``nvme`` or None."""
    device = (block.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device")
    return None if device in (None, "none") else str(device)


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
            f"here ({_first_line(error)}); install a C++ compiler, or set strategy_config.zero_force_ds_cpu_optimizer: "
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
            stack.callback(_leave_process_group)
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
        _initialize(frozen.body, _configuration(block, dtype), world, dtype, None)
        frozen.can_compile = stage_of(block) < 3
        return frozen


STRATEGY = DeepSpeedStrategy()


class ZeroEngine:
    """Trains ``root``, which DeepSpeed wraps and shards, with ``optimizer``. The methods are those of ``Engine``.

    Args:
        block: DeepSpeed's configuration, without what the run decides.
        compute_dtype: precision in which parameters are held and computed, the masters staying float32; None is
        float32.
        accumulates: whether a step may have several micro-batches.
    """

    def __init__(
        self,
        root: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        block: Mapping[str, Any],
        *,
        compute_dtype: torch.dtype | None = None,
        max_norm: float = 0.0,
        accumulates: bool = False,
    ) -> None:
        self.root, self.optimizer = root, optimizer
        # References, not copies: DeepSpeed makes its masters from the rounded parameters, so these are set again below.
        exact = {name: p.detach() for name, p in root.named_parameters() if p.requires_grad} if compute_dtype else {}
        config = _configuration(block, compute_dtype)
        config |= {
            "gradient_clipping": max_norm,
            # A number above 1 makes DeepSpeed accumulate at all; the boundaries are set step by step.
            "gradient_accumulation_steps": 2 if accumulates else 1,
            "zero_allow_untested_optimizer": True,
        }
        self._deepspeed = load_deepspeed()
        self._engine = _initialize(root, config, world, compute_dtype, optimizer)
        self._zero: Any = self._engine.optimizer
        self._by_name = dict(root.named_parameters())
        if exact:
            self._load_model(exact)

    def forward_backward(self, micro_batches: MicroBatches[Any]) -> Iterator[Any]:
        self._set_training(True)
        count = len(micro_batches)
        for number, micro_batch in enumerate(micro_batches, 1):
            output = self._engine(micro_batch)
            del micro_batch
            self._engine.set_gradient_accumulation_boundary(number == count)
            self._engine.backward(output.loss, scale_wrt_gas=False)
            yield output

    @torch.no_grad()
    def evaluate(self, micro_batch: Any) -> Any | None:
        self._set_training(False)
        return self._engine(micro_batch)

    def step(self) -> Tensor:
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._engine.device)

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        state = {
            name: tensor for name, tensor in self.root.state_dict(keep_vars=True).items() if name.startswith(MODEL)
        }
        uses = Counter(map(id, state.values()))
        tied: dict[int, Tensor] = {}  # kept, since gathering is not free and they come up again
        for name, tensor in state.items():
            value = tied[id(tensor)] if id(tensor) in tied else self._whole(tensor)
            if uses[id(tensor)] > 1:
                tied[id(tensor)] = value
            yield name.removeprefix(MODEL), value

    def state_dict(self) -> EngineState[Sequence[Shard]]:
        model = {name: self._shards(parameter, None) for name, parameter in self._trained()}
        return EngineState(model, self._optimizer_shards(), self._scaler_state())

    def load_state_dict(self, state: EngineState[Sliceable]) -> None:
        self._load_model(state.model)
        self._load_optimizer(state.optimizer)
        for key in _SCALER:
            if self._scaler is not None and key in state.scaler:
                setattr(self._scaler, key, state.scaler[key])

    def trained_names(self) -> set[str]:
        return {name for name, _ in self._trained()}

    def offload(self) -> None:
        raise LimbeckError("DeepSpeed moves no states between steps; use its own offload_optimizer and offload_param.")

    def reload(self) -> None:
        """Nothing was moved."""

    def held_tensors(self) -> dict[str, list[Tensor]]:
        parameters = list(self.root.parameters())
        kept = list(getattr(self._zero, "averaged_gradients", {}).values())
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return {
            # Of a parameter that ZeRO-3 shards, this rank's part.
            "parameters": [*(getattr(p, "ds_tensor", p) for p in parameters), *self.root.buffers()],
            "gradients": [
                *(p.grad for p in parameters if p.grad is not None),
                *(leaf for leaf in tree_leaves(kept) if torch.is_tensor(leaf)),
            ],
            "optimizer": [*(value for value in states if torch.is_tensor(value)), *self._flat_masters()],
        }

    def _set_training(self, training: bool) -> None:
        if self._engine.training != training:
            self._engine.train(training)

    def _whole(self, tensor: Any) -> Tensor:
        """The full value of a parameter, in float32 if it is trained, or of a buffer. Collective."""
        if not isinstance(tensor, nn.Parameter):
            return torch.as_tensor(tensor).detach()
        if tensor.requires_grad:
            value: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(tensor)
            return value.detach()
        with self._gathered([tensor]):
            return tensor.detach().clone()

    def _load_model(self, state: Mapping[str, Sliceable]) -> None:
        for name, value in state.items():
            parameter = self._by_name[name]
            with self._gathered([parameter], writer=0), torch.no_grad():
                if not self._is_sharded or dist.get_rank() == 0:
                    parameter.copy_(value[whole_box(value.shape)])
            if parameter.requires_grad:
                self._set(parameter, value, None)

    def _optimizer_shards(self) -> dict[str, list[Shard]]:
        entries = self.optimizer.state.get(self._flat_masters()[0], {})
        if entries:
            self._link_moments()
        return {
            f"{name}|{entry}": self._shards(parameter, entry)
            if _is_moment(value)
            else [shard_of(torch.as_tensor(value).detach().float())]
            for name, parameter in self._trained()
            for entry, value in entries.items()
        }

    def _shards(self, parameter: nn.Parameter, entry: str | None) -> list[Shard]:
        """This rank's piece of the float32 master (``entry`` None) or of a moment: boxes of the flattened tensor."""
        shape, (start, stop) = self._shape(parameter), self._piece(parameter)
        shards: list[Shard] = []
        for box in flat_boxes(shape, start, stop):
            sizes = [part.stop - part.start for part in box]
            read = partial(self._read_piece, parameter, entry, sum(shard.size for shard in shards), sizes)
            shards.append(Shard(shape, box, read))
        return shards

    def _read_piece(self, parameter: nn.Parameter, entry: str | None, start: int, sizes: list[int]) -> Tensor:
        utils, mapping = self._deepspeed.utils, getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            piece = mapping.get_hp_fragment(entry)
        elif entry is None:
            piece = utils.safe_get_local_fp32_param(parameter)
        else:
            piece = utils.safe_get_local_optimizer_state(parameter, entry)
        return piece.detach()[start : start + math.prod(sizes)].view(sizes)

    def _piece(self, parameter: Any) -> tuple[int, int]:
        """Where this rank's piece of the flattened parameter begins and ends."""
        if self._is_sharded:
            size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
            # The last rank's piece is padded.
            return min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)
        if parameter._hp_mapping is None:
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    @staticmethod
    def _shape(parameter: Any) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def _load_optimizer(self, tensors: Mapping[str, Sliceable]) -> None:
        first = next(iter(self._trained()))[0]
        keys = [key for key in tensors if key.startswith(f"{first}|")]
        moments = {key.rpartition("|")[2] for key in keys if len(tensors[key].shape)}
        counts = {key.rpartition("|")[2]: tensors[key][()] for key in keys if not len(tensors[key].shape)}
        for flat in self._flat_masters():  # the optimizer makes its state in its first step, which is still to come
            self.optimizer.state[flat] = {
                **{entry: torch.zeros_like(flat) for entry in moments},
                **{entry: self._count_of(value) for entry, value in counts.items()},
            }
        self._link_moments()
        for name, parameter in self._trained():
            for entry in moments:
                self._set(parameter, tensors[f"{name}|{entry}"], entry)

    def _scaler_state(self) -> dict[str, Any]:
        scaler = self._scaler
        return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)}

    @property
    def _scaler(self) -> Any:
        return getattr(self._zero, "loss_scaler", None) if self._engine.fp16_enabled() else None

    @property
    def _is_sharded(self) -> bool:
        return bool(self._engine.zero_optimization_partition_weights())

    def _trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._by_name.items() if p.requires_grad)

    def _flat_masters(self) -> Sequence[Tensor]:
        """The float32 pieces of this rank, which are what the optimizer steps."""
        return (
            self._zero.fp32_partitioned_groups_flat if self._is_sharded else self._zero.single_partition_of_fp32_groups
        )

    def _link_moments(self) -> None:
        """Let every parameter of ZeRO 1 and 2 know its piece of the moments; DeepSpeed does so for the first group
        alone.
        """
        if not self._is_sharded:
            link = self._deepspeed.utils.lazy_init_hp_params_optimizer_state
            for group, flat in zip(self._zero.bit16_groups, self._flat_masters(), strict=True):
                link(group, flat, self.optimizer.state)

    def _gathered(self, parameters: Sequence[nn.Parameter], writer: int | None = None) -> Any:
        if not self._is_sharded:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=writer)

    def _set(self, parameter: nn.Parameter, value: Sliceable, entry: str | None) -> None:
        """Put this rank's piece of a whole tensor into the masters (``entry`` None) or a moment of them."""
        utils, owner = self._deepspeed.utils, cast(Any, parameter)
        parts = [value[box].flatten().float() for box in flat_boxes(self._shape(parameter), *self._piece(parameter))]
        mine = torch.cat(parts) if parts else torch.empty(0)
        if not self._is_sharded:
            if owner._hp_mapping is not None:
                owner._hp_mapping.get_hp_fragment(entry).data.copy_(mine)
            return
        piece = torch.zeros(owner.ds_tensor.numel(), device=self._engine.device)  # the last rank's is padded
        piece[: mine.numel()] = mine
        if entry is None:
            utils.safe_set_local_fp32_param(parameter, piece)
        else:
            utils.safe_set_local_optimizer_state(parameter, piece, entry)

    def _count_of(self, value: Tensor) -> Any:
        """A step count as this optimizer keeps it: DeepSpeed's as an int, PyTorch's as a tensor beside the masters."""
        if type(self.optimizer).__module__.startswith("deepspeed."):
            return int(value)
        return value.clone().to(self._flat_masters()[0].device)


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _is_moment(value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim > 0


def _configuration(block: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """``block`` with what the run decides; gradients are averaged in float32 unless it says otherwise."""
    config: dict[str, Any] = {"communication_data_type": "fp32", **block, "train_micro_batch_size_per_gpu": 1}
    if stage_of(block) > 1:  # for stage 1 that is another optimizer class of DeepSpeed's, with states of its own
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    for known, key in _PRECISIONS.items():
        config[key] = {**config.get(key, {}), "enabled": known is dtype}
    return config


def _initialize(
    root: nn.Module,
    config: dict[str, Any],
    world: World,
    dtype: torch.dtype | None,
    optimizer: torch.optim.Optimizer | None,
) -> Any:
    """DeepSpeed's engine around ``root``."""
    deepspeed = load_deepspeed()
    try:
        if stage_of(config) == 3:
            # Parameter by parameter, so no device ever holds the whole model.
            for parameter in root.parameters():
                parameter.data = parameter.data.to(dtype or torch.float32)
            deepspeed.zero.Init(module=root, config_dict_or_path=config, dtype=dtype or torch.float32)
            for buffer in root.buffers():
                buffer.data = buffer.data.to(world.device)
        else:
            root.to(world.device)
        engine = deepspeed.initialize(model=root, optimizer=optimizer, config=config, dist_init_required=False)[0]
    except (AssertionError, ValueError) as error:  # pydantic's too
        raise LimbeckError(f"DeepSpeed refuses this strategy_config: {_first_line(error)}") from error
    return engine


def import_deepspeed() -> Any:
    """The DeepSpeed library; LimbeckError if it is not installed."""
    try:
        # deepspeed.zero imports it half-way through patching torch, which it does not survive.
        import deepspeed
        import torch._dynamo  # noqa: F401
    except ImportError as error:
        raise LimbeckError(
            "strategy_name = deepspeed_train or deepspeed_infer needs DeepSpeed; pip install 'limbeck[deepspeed]', or use "
            "fsdp2_train and fsdp2_infer, which need nothing more."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It would be compiled for a minute, by a compiler that may not be there, to add up small tensors a little faster.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def load_deepspeed() -> Any:
    """DeepSpeed, joined to the process group of this process; a process that has none gets one of its own."""
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it; a single process has no launcher
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _leave_process_group() -> None:
    """Let DeepSpeed forget the process group, so that it can join another one."""
    deepspeed = import_deepspeed()
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else type(error).__name__ + "."
