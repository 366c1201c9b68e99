"""The DeepSpeed library: loaded, configured, and joined to the process group."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from limbeck.errors import LimbeckError
from limbeck.strategies.world import World

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def stage_of(block: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed block; 0 (no sharding) if it sets none."""
    return int(block.get("zero_optimization", {}).get("stage", 0))


def offload_device(block: Mapping[str, Any], what: str) -> str | None:
    """Where a block keeps its ``optimizer`` or ``param`` outside the accelerator: ``cpu``, ``nvme`` or None."""
    device = (block.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device")
    return None if device in (None, "none") else str(device)


def configuration(block: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """``block`` with what the run decides; gradients are averaged in float32 unless it says otherwise."""
    config: dict[str, Any] = {"communication_data_type": "fp32", **block, "train_micro_batch_size_per_gpu": 1}
    if stage_of(block) > 1:  # for stage 1 that is another optimizer class of DeepSpeed's, with states of its own
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    for known, key in _PRECISIONS.items():
        config[key] = {**config.get(key, {}), "enabled": known is dtype}
    return config


def initialize(
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
        raise LimbeckError(f"DeepSpeed refuses this strategy_config: {first_line(error)}") from error
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


def leave_process_group() -> None:
    """Let DeepSpeed forget the process group, so that it can join another one."""
    deepspeed = import_deepspeed()
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else type(error).__name__ + "."
