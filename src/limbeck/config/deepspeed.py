"""What of a DeepSpeed configuration is passed on to DeepSpeed, and what the run itself decides.

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


SET_ELSEWHERE = {
    "train_batch_size": "follows from student.training_args",
    "train_micro_batch_size_per_gpu": "is student.training_args.per_device_train_batch_size",
    "gradient_accumulation_steps": "is student.training_args.gradient_accumulation_steps",
    "gradient_clipping": "is max_grad_norm",
    "optimizer": "is AdamW with student.training_args.learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon",
    "scheduler": "is student.training_args.lr_scheduler_type with its warmup_steps and lr_scheduler_kwargs",
}
"""Keys that must be `auto`, with where their value is set."""

PASSED = words(
    """zero_optimization bf16 fp16 communication_data_type prescale_gradients gradient_predivide_factor
    zero_force_ds_cpu_optimizer aio comms_logger flops_profiler steps_per_print wall_clock_breakdown memory_breakdown
    dump_state tensorboard csv_monitor"""
)
NO_MEANING = words("zero_allow_untested_optimizer activation_checkpointing")
"""Always allowed, and student.model_args.disable_gradient_checkpointing."""

ZERO_PASSED = words(
    """stage offload_optimizer offload_param allgather_partitions allgather_bucket_size overlap_comm reduce_scatter
    reduce_bucket_size contiguous_gradients round_robin_gradients sub_group_size ignore_unused_parameters
    prefetch_bucket_size stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
    model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters
    max_reuse_distance stage3_max_reuse_distance stage3_module_granularity_threshold memory_efficient_linear
    stage3_use_all_reduce_for_fetch_params log_trace_cache_warnings zero_hpz_partition_size"""
)
ZERO_NO_MEANING = words(
    """load_from_fp32_weights elastic_checkpoint gather_16bit_weights_on_model_save
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save"""
)
"""Steer DeepSpeed's own checkpoints, which are not written: a checkpoint is whole and the same for every strategy."""

OFFLOAD_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}


def stage_of(block: Mapping[str, Any]) -> int:
    """The ZeRO stage of a block; {} (no optimisation) is stage 0, as it is to DeepSpeed, and so is what is no stage."""
    optimization = block.get("zero_optimization")
    stage = optimization.get("stage", 0) if isinstance(optimization, Mapping) else 0
    return stage if type(stage) is int and 0 <= stage <= 3 else 0


def passed_on(block: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is to read of a block: known keys with a value of their own, without those that are `auto`."""

    def kept(values: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key in known and value not in ("auto", None)}

    made = kept(block, PASSED)
    for key in ("bf16", "fp16"):
        if isinstance(made.get(key), Mapping):
            made[key] = {name: value for name, value in made[key].items() if name != "enabled" and value != "auto"}
    if isinstance(made.get("zero_optimization"), Mapping):
        made["zero_optimization"] = kept(made["zero_optimization"], ZERO_PASSED)
    return {key: value for key, value in made.items() if value != {}}


def contradictions(block: Mapping[str, Any], path: str, dtype: object) -> Iterator[Contradiction]:
    """What a DeepSpeed block at `path` asks for that does not run here; `dtype` is the model's."""
    for key, value in block.items():
        if key in SET_ELSEWHERE:
            if value not in ("auto", None):
                yield Contradiction(
                    f"{path}.{key}", f"= {shown(value)} {SET_ELSEWHERE[key]} here; set it there, and auto here"
                )
        elif key in ("fp16", "bf16", "zero_optimization") and not isinstance(value, (Mapping, type(None))):
            yield Contradiction(f"{path}.{key}", f"= {shown(value)} must be a section of keys, as DeepSpeed has it")
        elif key in ("fp16", "bf16"):
            enabled = (value or {}).get("enabled", "auto")
            if isinstance(enabled, bool) and enabled != (dtype == key):
                yield Contradiction(
                    f"{path}.{key}.enabled", f"= {shown(enabled)} contradicts model_args.dtype = {dtype}; write auto"
                )
        elif key == "zero_optimization":
            yield from _zero_contradictions(value or {}, f"{path}.{key}")
        elif key not in PASSED and key not in NO_MEANING:
            yield Contradiction(f"{path}.{key}", "is not among the keys that are passed on to DeepSpeed; take it out")


def _zero_contradictions(optimization: Mapping[str, Any], path: str) -> Iterator[Contradiction]:
    stage = optimization.get("stage", 0)
    for key, value in optimization.items():
        if key == "stage":
            if type(value) is not int or not 0 <= value <= 3:
                yield Contradiction(f"{path}.stage", f"= {shown(value)} is not a ZeRO stage; use 0, 1, 2 or 3")
        elif key in OFFLOAD_STAGES:
            yield from _offload_contradictions(value, f"{path}.{key}", stage, OFFLOAD_STAGES[key])
        elif key not in ZERO_PASSED and key not in ZERO_NO_MEANING:
            yield Contradiction(f"{path}.{key}", "is not among the keys that are passed on to DeepSpeed; take it out")


def _offload_contradictions(
    value: object, path: str, stage: object, stages: tuple[int, ...]
) -> Iterator[Contradiction]:
    device = value.get("device", "none") if isinstance(value, Mapping) else value
    if device in (None, "none"):
        return
    if not isinstance(value, Mapping):
        yield Contradiction(path, f"= {shown(value)} must be a section; write {{device: cpu}}")
    elif device not in ("cpu", "nvme"):
        yield Contradiction(f"{path}.device", f"= {shown(device)} is not a place to offload to; use cpu, nvme or none")
    elif stage not in stages:
        named = "stage 3" if stages == (3,) else "stage 1, 2 or 3"
        yield Contradiction(path, f"= {device} needs ZeRO {named}, and this is stage {stage}; change one of them")
    elif device == "nvme" and not value.get("nvme_path"):
        yield Contradiction(path, "= nvme needs nvme_path, a folder on the disk; add it")
