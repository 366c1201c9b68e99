"""Precisions by the names that configurations use, and which of them a role computes in."""

from __future__ import annotations

import torch

from limbeck.config.schema import StudentModelArgs, WorkerConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(worker: WorkerConfig) -> torch.dtype:
    """What a role's layers compute in: ``strategy_config.param_dtype``, else ``model_args.dtype``. A teacher is loaded
    in it.
    """
    return DTYPES[worker.strategy_args.strategy_config.param_dtype or worker.model_args.dtype]


def student_load_dtype(args: StudentModelArgs) -> torch.dtype:
    """What the student is loaded in: float32, since optimizer steps are too small for half precision. A LoRA base is
    not trained and keeps ``dtype``.
    """
    return DTYPES[args.dtype] if args.lora_target else torch.float32
