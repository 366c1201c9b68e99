"""DeepSpeed: ZeRO stages 1, 2 and 3 by DeepSpeed itself.

DeepSpeed keeps float32 masters and moments in flat pieces, one a rank. Here they are cut and joined into whole tensors under
plain names, so a checkpoint is the same as any other strategy's and resumes on another stage or number of ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from limbeck.errors import LimbeckError
from limbeck.strategies.world import World

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def stage_of(block: Mapping[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed block asks for; 0, none at all, unless it says."""
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
    start()
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


class ZeroEngine:
    """A root module that DeepSpeed wraps, shards and steps with a given optimizer.

    block: DeepSpeed's configuration, without what the run decides. compute_dtype: what parameters are held and computed in, the
    masters staying float32; None is float32. accumulates: whether a step may have several micro-batches.
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
        self.root, self.optimizer, self._is_main = root, optimizer, world.is_main
        # References, not copies: DeepSpeed makes its masters from the rounded parameters, so these are set again below.
        exact = {name: p.detach() for name, p in root.named_parameters() if p.requires_grad} if compute_dtype else {}
        config = _configuration(block, compute_dtype)
        config |= {
            "gradient_clipping": max_norm,
            # More than one tells DeepSpeed to accumulate at all; how often is decided by ``last``, step by step.
            "gradient_accumulation_steps": 2 if accumulates else 1,
            "zero_allow_untested_optimizer": True,
        }
        self._deepspeed = start()
        self._engine = _initialize(root, config, world, compute_dtype, optimizer)
        self._zero: Any = self._engine.optimizer
        self._by_name = dict(root.named_parameters())
        if exact:
            self.scatter_model(exact)

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._engine.device)

    def masters(self) -> list[Tensor]:
        """The float32 numbers of this rank, which are what the optimizer steps."""
        return list(self._flat_masters())

    def gradients(self) -> list[Tensor]:
        """What DeepSpeed keeps between a backward pass and the step, beside the parameters' own ``grad``."""
        kept = list(getattr(self._zero, "averaged_gradients", {}).values())
        return [leaf for leaf in tree_leaves(kept) if torch.is_tensor(leaf)]

    def gather_model(self) -> dict[str, Any]:
        whole: dict[str, Any] = {}
        names: dict[int, str] = {}  # tied parameters have several
        for name, tensor in self.root.state_dict(keep_vars=True).items():
            if not isinstance(tensor, nn.Parameter):
                value = tensor
            elif id(tensor) in names:
                if self._is_main:
                    whole[name] = whole[names[id(tensor)]]
                continue
            elif tensor.requires_grad:
                value = self._deepspeed.utils.safe_get_full_fp32_param(tensor)
            else:
                with self._gathered([tensor]):
                    value = tensor.detach().clone()
            names[id(tensor)] = name
            if self._is_main:
                whole[name] = value.detach().cpu()
        return whole

    def scatter_model(self, state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            parameter = self._by_name[name]
            with self._gathered([parameter], writer=0), torch.no_grad():
                parameter.copy_(value)
            if parameter.requires_grad:
                self._set(parameter, value, None)

    def gather_optimizer(self) -> dict[str, Tensor]:
        entries = self.optimizer.state.get(self._flat_masters()[0], {})
        whole: dict[str, Tensor] = {}
        if entries:
            self._link_moments()
        for name, parameter in self._trained():
            for entry, value in entries.items():
                if _is_moment(value):
                    value = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, entry)
                if self._is_main:
                    whole[f"{name}|{entry}"] = torch.as_tensor(value).detach().cpu().float()
        return whole

    def scatter_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        first = next(iter(self._trained()))[0]
        entries = {key.rpartition("|")[2]: value for key, value in tensors.items() if key.startswith(f"{first}|")}
        for flat in self._flat_masters():  # the optimizer makes its state in its first step, which is still to come
            self.optimizer.state[flat] = {
                entry: torch.zeros_like(flat) if _is_moment(value) else self._count_of(value)
                for entry, value in entries.items()
            }
        self._link_moments()
        for name, parameter in self._trained():
            for entry, value in entries.items():
                if _is_moment(value):
                    self._set(parameter, tensors[f"{name}|{entry}"], entry)

    def scaler_state(self) -> dict[str, Any]:
        scaler = self._scaler
        return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        for key in _SCALER:
            if self._scaler is not None and key in state:
                setattr(self._scaler, key, state[key])

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
        """Let every parameter of ZeRO 1 and 2 know its piece of the moments; DeepSpeed does so for the first group alone."""
        if not self._is_sharded:
            link = self._deepspeed.utils.lazy_init_hp_params_optimizer_state
            for group, flat in zip(self._zero.bit16_groups, self._flat_masters(), strict=True):
                link(group, flat, self.optimizer.state)

    def _gathered(self, parameters: Sequence[nn.Parameter], writer: int | None = None) -> Any:
        if not self._is_sharded:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=writer)

    def _set(self, parameter: nn.Parameter, value: Tensor, entry: str | None) -> None:
        """Put this rank's part of a whole tensor into the masters (``entry`` None) or a moment of them."""
        utils = self._deepspeed.utils
        value = value.to(self._engine.device, torch.float32)
        if not self._is_sharded:
            if entry is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, entry)
            return
        # The last rank's piece is padded, which DeepSpeed's setters of whole tensors do not allow for.
        owner: Any = parameter
        size, rank = owner.ds_tensor.numel(), dist.get_rank(owner.ds_process_group)
        piece = value.new_zeros(size)
        mine = value.flatten()[rank * size : (rank + 1) * size]
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


def shard_frozen(body: nn.Module, world: World, block: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A frozen module sharded by ZeRO-3 in place: its hooks gather each layer where it runs."""
    _initialize(body, _configuration(block, dtype), world, dtype, None)
    return body


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
    deepspeed = start()
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


def start() -> Any:
    """DeepSpeed, ready to be used in this process; LimbeckError when it is not installed."""
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
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks the environment, and nobody launched a process alone
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else type(error).__name__ + "."
