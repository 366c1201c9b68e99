"""AdamW over masters in float32, a Hugging Face learning-rate schedule, and clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from limbeck.config.schema import TrainingArgs


def make_optimizer(module: nn.Module, args: TrainingArgs) -> torch.optim.Optimizer:
    """AdamW; weight decay acts on matrices, not on biases and norms."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
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


def clip_gradients(module: nn.Module, max_norm: float) -> Tensor:
    """The gradients' norm over all processes, as a device scalar; they are scaled down to ``max_norm`` if above (0 = off)."""
    alike: dict[Any, list[nn.Parameter]] = {}  # only tensors of one mesh can be added
    for parameter in module.parameters():
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            alike.setdefault(mesh, []).append(parameter)
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        for parameters in alike.values()
    ]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for parameters in alike.values():
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm if max_norm > 0 else float("inf"), total)
    return total
