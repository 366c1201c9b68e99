"""AdamW over masters in float32, and a learning-rate schedule of transformers or a sequence of PyTorch's."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from limbeck.config.schema import SEQUENTIAL_KWARGS, TrainingArgs

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
    """The schedule over ``total_steps``; ``warmup_steps`` wins over ``warmup_ratio``. The rate is a function of the step."""
    if args.lr_scheduler_type == "sequential":
        return LambdaLR(
            optimizer, partial(_sequential_factor, kwargs=args.lr_scheduler_kwargs, rate=args.learning_rate)
        )
    warmup = args.warmup_steps or int(args.warmup_ratio * total_steps + 0.5)
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs),
    )


def _sequential_factor(step: int, kwargs: Mapping[str, Any], rate: float) -> float:
    """The factor of the learning rate at ``step`` of PyTorch's ``SequentialLR``.

    Args:
        kwargs: the ``lr_scheduler_kwargs`` of ``sequential``, checked.
        rate: the learning rate, which only a smallest rate (``eta_min``) depends on.
    """
    step //= kwargs.get("interval", 1)
    milestones = kwargs.get("milestones") or []
    stage = bisect_right(milestones, step)
    begin = milestones[stage - 1] if stage else 0
    given = dict(kwargs["schedulers"][stage])
    name = given.pop("name")
    return _FACTORS[name](step - begin, rate, **{**SEQUENTIAL_KWARGS[name], **given})


def _linear(step: int, rate: float, start_factor: float, end_factor: float, total_iters: int) -> float:
    return start_factor + (end_factor - start_factor) * (min(step, total_iters) / total_iters if total_iters else 1.0)


def _cosine(step: int, rate: float, T_max: int, eta_min: float) -> float:
    smallest = eta_min / rate if rate else 0.0
    return smallest + (1 - smallest) * (1 + math.cos(math.pi * step / T_max)) / 2


_FACTORS: dict[str, Callable[..., float]] = {
    "ConstantLR": lambda step, rate, factor, total_iters: factor if step < total_iters else 1.0,
    "CosineAnnealingLR": _cosine,
    "ExponentialLR": lambda step, rate, gamma: gamma**step,
    "LinearLR": _linear,
    "PolynomialLR": lambda step, rate, total_iters, power: max(0.0, 1 - step / total_iters) ** power,
    "StepLR": lambda step, rate, step_size, gamma: gamma ** (step // step_size),
}
"""The factor of the learning rate at a step of each schedule: (step, learning rate, its arguments)."""
