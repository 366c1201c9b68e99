"""Which keys of a DeepSpeed configuration are passed to DeepSpeed, and which ones other keys of the run decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from limbeck.config.schema import Contradiction
from limbeck.config.validation_errors import format_value


def words(text: str) -> frozenset[str]:
    """The words of ``text`` as a set: a shorter way to write a set of keys."""
    return frozenset(text.split())


SET_ELSEWHERE = {
    "train_batch_size": "follows from student.training_args",
    "train_micro_batch_size_per_gpu": "is student.training_args.per_device_train_batch_size",
    "gradient_accumulation_steps": "is student.training_args.gradient_accumulation_steps",
    "gradient_clipping": "is max_grad_norm",
    "optimizer": "is AdamW with student.training_args.learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon",
    "scheduler": "is student.training_args.lr_scheduler_type with its warmup_steps and lr_scheduler_kwargs",
}
"""Keys that must be `auto` or absent, with the end of the error message: which key of the run decides the value."""

PASSED = words(
    """zero_optimization bf16 fp16 communication_data_type prescale_gradients gradient_predivide_factor
    zero_force_ds_cpu_optimizer aio comms_logger flops_profiler steps_per_print wall_clock_breakdown memory_breakdown
    dump_state tensorboard csv_monitor"""
)
NO_MEANING = words("zero_allow_untested_optimizer activation_checkpointing")
"""Ignored: untested optimizers are always allowed; student.model_args.disable_gradient_checkpointing decides the other."""

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
"""Ignored: options of DeepSpeed's own checkpoint format, which Limbeck does not write."""

OFFLOAD_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}


def stage_of(block: Mapping[str, Any]) -> int:
    """The ZeRO stage of a block; 0 if the block has none or an invalid one."""
    optimization = block.get("zero_optimization")
    stage = optimization.get("stage", 0) if isinstance(optimization, Mapping) else 0
    return stage if type(stage) is int and 0 <= stage <= 3 else 0


def passed_on(block: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a block that is passed to DeepSpeed: supported keys whose value is not `auto`."""

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
    """Keys of the DeepSpeed block at `path` that are not supported or contradict the run; `dtype` is the model's."""
    for key, value in block.items():
        if key in SET_ELSEWHERE:
            if value not in ("auto", None):
                yield Contradiction(
                    f"{path}.{key}",
                    f"= {format_value(value)} {SET_ELSEWHERE[key]} in Limbeck; set it there, and write auto here",
                )
        elif key in ("fp16", "bf16", "zero_optimization") and not isinstance(value, (Mapping, type(None))):
            yield Contradiction(f"{path}.{key}", f"= {format_value(value)} must be a section of keys")
        elif key in ("fp16", "bf16"):
            enabled = (value or {}).get("enabled", "auto")
            if isinstance(enabled, bool) and enabled != (dtype == key):
                yield Contradiction(
                    f"{path}.{key}.enabled",
                    f"= {format_value(enabled)} contradicts model_args.dtype = {dtype}; write auto",
                )
        elif key == "zero_optimization":
            yield from _zero_contradictions(value or {}, f"{path}.{key}")
        elif key not in PASSED and key not in NO_MEANING:
            yield Contradiction(f"{path}.{key}", "is not among the keys that Limbeck passes to DeepSpeed; remove it")


def _zero_contradictions(optimization: Mapping[str, Any], path: str) -> Iterator[Contradiction]:
    stage = optimization.get("stage", 0)
    for key, value in optimization.items():
        if key == "stage":
            if type(value) is not int or not 0 <= value <= 3:
                yield Contradiction(f"{path}.stage", f"= {format_value(value)} is not a ZeRO stage; use 0, 1, 2 or 3")
        elif key in OFFLOAD_STAGES:
            yield from _offload_contradictions(value, f"{path}.{key}", stage, OFFLOAD_STAGES[key])
        elif key not in ZERO_PASSED and key not in ZERO_NO_MEANING:
            yield Contradiction(f"{path}.{key}", "is not among the keys that Limbeck passes to DeepSpeed; remove it")


def _offload_contradictions(
    value: object, path: str, stage: object, stages: tuple[int, ...]
) -> Iterator[Contradiction]:
    device = value.get("device", "none") if isinstance(value, Mapping) else value
    if device in (None, "none"):
        return
    if not isinstance(value, Mapping):
        yield Contradiction(path, f"= {format_value(value)} must be a section; write {{device: cpu}}")
    elif device not in ("cpu", "nvme"):
        yield Contradiction(
            f"{path}.device", f"= {format_value(device)} is not an offload device; use cpu, nvme or none"
        )
    elif stage not in stages:
        named = "stage 3" if stages == (3,) else "stage 1, 2 or 3"
        yield Contradiction(path, f"= {device} needs ZeRO {named}, and this is stage {stage}; change one of them")
    elif device == "nvme" and not value.get("nvme_path"):
        yield Contradiction(path, "= nvme needs nvme_path, a folder on the disk; add it")
