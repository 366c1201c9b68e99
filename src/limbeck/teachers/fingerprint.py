"""Compares the configuration that a teacher service was started with to that of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError

_PACKING = "student.use_sequence_packing"


def teacher_fingerprint(config: DistillConfig) -> dict[str, Any]:
    """What a teacher's signals depend on besides the request, by configuration key."""
    args = config.teacher.model_args
    name = args.model_name_or_path
    given = {
        "teacher.model_args.model_name_or_path": str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        "teacher.model_args.revision": args.revision,
        "teacher.model_args.model_config_kwargs": args.model_config_kwargs,
        "teacher.model_args.megatron_arguments": args.megatron_arguments,
        "teacher.model_args.from_scratch": args.from_scratch,
        "teacher.model_args.attn_implementation": args.attn_implementation,
        "teacher.model_args.dtype": config.teacher.strategy_args.strategy_config.param_dtype or args.dtype,
        _PACKING: config.student.use_sequence_packing and config.cross_tokenizer == "off",
    }
    return {**given, "seed": config.seed} if args.from_scratch else given


def check_fingerprint(service: str, serves: Mapping[str, Any], config: DistillConfig) -> None:
    """Raise LimbeckError, naming every key, unless the ``service`` with the fingerprint ``serves`` fits ``config``.

    A teacher that keeps packed documents apart also serves rows that are not packed.
    """
    ours = teacher_fingerprint(config)
    differ = [key for key in ours if ours[key] != serves.get(key) and (key != _PACKING or ours[key])]
    if differ:
        each = ", ".join(f"{key} = {serves.get(key)} (this run: {ours[key]})" for key in differ)
        raise LimbeckError(
            f"the teacher service {service} does not fit this run: it was started with {each}; give both the same, or serve "
            "another teacher under another name."
        )
