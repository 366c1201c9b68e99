"""The arguments of transformers' ``TrainingArguments`` and TRL's ``SFTConfig``, which several dialects contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value

MOVED: dict[str, str] = {
    **{
        name: f"student.training_args.{name}"
        for name in (
            *(
                "learning_rate",
                "lr_scheduler_type",
                "lr_scheduler_kwargs",
                "warmup_steps",
                "warmup_ratio",
                "weight_decay",
            ),
            *("adam_beta1", "adam_beta2", "adam_epsilon", "per_device_train_batch_size", "gradient_accumulation_steps"),
            *("group_by_length", "data_seed"),
        )
    },
    **{
        name: name
        for name in (
            *("max_grad_norm", "max_steps", "seed", "save_steps", "logging_steps", "eval_steps", "output_dir"),
            *("logging_dir", "resume_from_checkpoint"),
        )
    },
    "save_total_limit": "max_ckpt_to_keep",
    "per_device_eval_batch_size": "student.infer_batch_size",
    "run_name": "exp_name",
    "packing": "student.use_sequence_packing",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
}
"""Arguments with the same meaning in Limbeck."""

ANSWERS_ONLY = ("assistant_only_loss", "completion_only_loss")
"""Arguments of TRL that leave prompts out of the loss."""

SPECIAL = (
    *("num_train_epochs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "report_to", "bf16", "fp16"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "deepspeed", "optim", "save_strategy"),
    *("eval_strategy", *ANSWERS_ONLY),
)

IGNORED = frozenset(
    (
        *("overwrite_output_dir", "remove_unused_columns", "dataloader_num_workers", "dataloader_pin_memory", "tf32"),
        *("disable_tqdm", "logging_first_step", "logging_strategy", "log_level", "ddp_find_unused_parameters"),
        *("dataset_num_proc", "dataset_text_field", "dataset_kwargs", "do_train", "do_eval", "save_safetensors"),
        *(
            "ddp_timeout",
            "hub_strategy",
            "hub_always_push",
            "torch_compile",
            "use_liger_kernel",
            "average_tokens_across_devices",
        ),
        *("dataloader_drop_last", "dataloader_prefetch_factor", "include_num_input_tokens_seen", "save_only_model"),
    )
)
"""Arguments that do not change the trained student."""

ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "optim": (
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw"),
        "is not supported; Limbeck's optimizer is AdamW, so remove it",
    ),
    "save_strategy": (("steps",), "is not supported; set save_steps (0 saves only the end), and remove it"),
    "eval_strategy": (("steps", "no"), "is not supported; set eval_steps, and remove it"),
}
"""Arguments of which only some values are supported, and the end of the error message for others."""

REPORTS = {name: name for name in ("tensorboard", "wandb", "mlflow", "swanlab", "none")}
"""Values of ``report_to`` and the trackers with the same meaning."""


def translate(translation: Translation, given: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Set Limbeck's keys from the arguments ``given``.

    Args:
        origins: each argument to its key or flag in the source, for messages.
    """
    for name, value in given.items():
        origin = origins[name]
        if name in IGNORED:
            translation.ignored.append(origin)
        elif name not in MOVED and name not in SPECIAL:
            translation.refuse(origin, "is not an argument that Limbeck can translate; remove it")
        elif value is not None and name in MOVED:
            translation.set(MOVED[name], value, origin)
    for name, (supported, sentence) in ONLY.items():
        if given.get(name) not in (None, *supported):
            translation.refuse(origins[name], f"= {format_value(given[name])} {sentence}")
    if given.get("max_steps") in (None, -1) and given.get("num_train_epochs") is not None:
        translation.set(
            "student.training_args.num_train_epochs", given["num_train_epochs"], origins["num_train_epochs"]
        )
    for name in ANSWERS_ONLY:
        if given.get(name):
            translation.set("distill_on_prompt", False, origins[name])
    _recomputation(translation, given, origins)
    _tracker(translation, given, origins)
    _hub(translation, given, origins)
    if given.get("deepspeed"):
        translation.refuse(
            origins["deepspeed"],
            "is not read here; set student.strategy_args.strategy_name: deepspeed_train and write the keys in "
            "student.strategy_args.strategy_config.deepspeed, or start the run with accelerate launch --use_deepspeed",
        )


def precision(given: Mapping[str, Any]) -> str | None:
    """The ``model_args.dtype`` that ``bf16`` and ``fp16`` select; None if neither is given or both are true."""
    bf16, fp16 = given.get("bf16"), given.get("fp16")
    if (bf16 is None and fp16 is None) or (bf16 and fp16):
        return None
    return "fp16" if fp16 else "bf16" if bf16 or bf16 is None else "fp32"


def _recomputation(translation: Translation, given: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    recompute, kwargs = given.get("gradient_checkpointing"), given.get("gradient_checkpointing_kwargs") or {}
    if isinstance(recompute, bool):
        key = "student.model_args.disable_gradient_checkpointing"
        translation.set(key, not recompute, origins["gradient_checkpointing"])
    elif recompute is not None:
        translation.refuse(origins["gradient_checkpointing"], f"= {format_value(recompute)} must be true or false")
    if isinstance(kwargs, Mapping) and kwargs.get("use_reentrant") is not None:
        key, origin = "student.model_args.gradient_checkpointing_use_reentrant", "gradient_checkpointing_kwargs"
        translation.set(key, kwargs["use_reentrant"], origins[origin])


def _tracker(translation: Translation, given: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    reports = given.get("report_to")
    reports = reports if isinstance(reports, list) else [] if reports in (None, "all") else [reports]
    known = [REPORTS[one] for one in map(str, reports) if one in REPORTS]
    if len(known) < len(reports):
        translation.refuse(
            origins["report_to"], f"= {format_value(given['report_to'])} must be one of {', '.join(REPORTS)}"
        )
    elif known:
        translation.set("track_with", known[0] if len(known) == 1 else known, origins["report_to"])


def _hub(translation: Translation, given: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """``push_to_hub`` decides; the other arguments describe the repository."""
    section = "checkpoint_config.save_to_hub"
    if not given.get("push_to_hub"):
        translation.ignored.extend(origins[name] for name in ("hub_model_id", "hub_revision") if given.get(name))
        return
    if not given.get("hub_model_id"):
        translation.refuse(
            origins["push_to_hub"], "= true needs the name of the repository; set hub_model_id: OWNER/NAME"
        )
        return
    for name, key in (("hub_model_id", "repo_id"), ("hub_private_repo", "private"), ("hub_revision", "branch")):
        if given.get(name) is not None:
            translation.set(f"{section}.{key}", given[name], origins[name])
