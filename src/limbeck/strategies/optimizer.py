"""AdamW over masters in float32, and a Hugging Face learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from limbeck.config.schema import TrainingArgs

_ADAMW = partial(torch.optim.AdamW, fused=True)


def make_optimizer(
    module: nn.Module,
    args: TrainingArgs,
    adamw: Callable[..., torch.optim.Optimizer] = _ADAMW,
) -> torch.optim.Optimizer:
    """AdamW, in the implementation that is given; weight decay acts on matrices, not on biases and norms."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return adamw(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, args: TrainingArgs, total_steps: int) -> Any:
    """The schedule over ``total_steps``; ``warmup_steps`` wins over ``warmup_ratio``."""
    warmup = args.warmup_steps or int(args.warmup_ratio * total_steps + 0.5)
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs),
    )
