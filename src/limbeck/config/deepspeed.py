"""Runs a DeepSpeed ZeRO configuration on FSDP2, which computes the same: stage 0 keeps whole replicas, stages 1 and 2
keep the parameters gathered after the forward pass, stage 3 frees them.

Only the JSON-like block itself is known here, not where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from limbeck.config.mistakes import shown
from limbeck.config.schema import Contradiction


def words(text: str) -> frozenset[str]:
    """The words of a table cell that would be a column of quoted strings otherwise."""
    return frozenset(text.split())


STAGES: dict[int, dict[str, Any]] = {
    0: {"replicate": True},
    1: {"reshard_after_forward": False},
    2: {"reshard_after_forward": False},
    3: {"reshard_after_forward": True},
}
"""ZeRO stage -> our strategy_config."""

SET_ELSEWHERE = {
    "train_batch_size": "follows from student.training_args",
    "train_micro_batch_size_per_gpu": "is student.training_args.per_device_train_batch_size",
    "gradient_accumulation_steps": "is student.training_args.gradient_accumulation_steps",
    "gradient_clipping": "is max_grad_norm",
}
"""Keys that must be `auto`, with where their value is set."""

NO_MEANING = words(
    """zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown prescale_gradients
    comms_logger flops_profiler tensorboard csv_monitor dump_state memory_breakdown activation_checkpointing"""
)
ZERO_NO_MEANING = words(
    """allgather_partitions allgather_bucket_size overlap_comm reduce_scatter reduce_bucket_size contiguous_gradients
    round_robin_gradients sub_group_size ignore_unused_parameters load_from_fp32_weights
    stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save"""
)
"""Buffer sizes, overlap and logging: nothing that a result depends on."""


def strategy_config_from_zero(zero: Mapping[str, Any]) -> dict[str, Any]:
    """Our strategy_config for a DeepSpeed block; {} (no optimisation) is stage 0, as it is to DeepSpeed."""
    optimization = zero.get("zero_optimization")
    stage = optimization.get("stage", 0) if isinstance(optimization, Mapping) else 0
    return dict(STAGES[stage]) if type(stage) is int and stage in STAGES else {}


def contradictions(zero: Mapping[str, Any], path: str, dtype: object) -> Iterator[Contradiction]:
    """What a DeepSpeed block at `path` asks for that does not run here; `dtype` is the model's."""
    for key, value in zero.items():
        if key in SET_ELSEWHERE:
            if value != "auto":
                yield Contradiction(
                    f"{path}.{key}", f"= {shown(value)} {SET_ELSEWHERE[key]} here; set it there, and auto here"
                )
        elif key in ("fp16", "bf16"):
            if isinstance(value, Mapping) and value.get("enabled") is True and dtype != key:
                yield Contradiction(
                    f"{path}.{key}.enabled", f"= true contradicts model_args.dtype = {dtype}; write auto"
                )
        elif key == "zero_optimization" and isinstance(value, Mapping):
            yield from _zero_contradictions(value, f"{path}.{key}")
        elif key not in NO_MEANING:
            yield Contradiction(f"{path}.{key}", "has no counterpart where DeepSpeed's blocks run here; take it out")


def _zero_contradictions(optimization: Mapping[str, Any], path: str) -> Iterator[Contradiction]:
    for key, value in optimization.items():
        if key == "stage":
            if type(value) is not int or value not in STAGES:
                yield Contradiction(f"{path}.stage", f"= {shown(value)} is not a ZeRO stage; use 0, 1, 2 or 3")
        elif key in ("offload_optimizer", "offload_param"):
            device = value.get("device") if isinstance(value, Mapping) else value
            if device not in (None, False, "none"):
                yield Contradiction(
                    f"{path}.{key}",
                    f"= {device} (parameters or optimizer outside the GPU) is not built yet; take it out",
                )
        elif key not in ZERO_NO_MEANING:
            yield Contradiction(f"{path}.{key}", "has no counterpart where DeepSpeed's blocks run here; take it out")
