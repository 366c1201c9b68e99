"""The optimizer over masters in float32, and a learning-rate schedule of transformers or a sequence of PyTorch's."""

from __future__ import annotations

import importlib.util
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, get_scheduler

from limbeck.config.schema import SEQUENTIAL_KWARGS, TrainingArgs
from limbeck.errors import LimbeckError
from limbeck.strategies.parallel_dims import ParallelDims

_ADAMW = partial(torch.optim.AdamW, fused=True)


class CombinedOptimizer(torch.optim.Optimizer):
    """Optimizers over different parameters as one: their groups one after the other, and one state."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._optimizers = optimizers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = iter(self.param_groups)
        for optimizer in self._optimizers:  # load_state_dict replaces groups and state
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state
            optimizer.step()


def check_optimizer(name: str, dims: ParallelDims, *, deepspeed: bool = False) -> None:
    """Raise LimbeckError if the optimizer does not run in this layout."""
    key = f"student.training_args.optimizer_name = {name}"
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise LimbeckError(f"{key} needs PyTorch 2.9 or later; upgrade torch, or use adamw.")
    if name == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
        raise LimbeckError(f"{key} needs torchao; pip install 'limbeck[torchao]', or use adamw.")
    if name == "adamw":
        return
    if deepspeed:
        raise LimbeckError(f"{key} does not run with deepspeed_train; use adamw, or fsdp2_train.")
    if name == "muon" and dims.tp == dims.pp == 1:
        return
    if dims.size > 1:
        where = "with tensor or pipeline parallelism" if name == "muon" else "on several ranks"
        raise LimbeckError(f"{key} does not run {where}; use adamw.")


def make_optimizer(
    module: nn.Module,
    args: TrainingArgs,
    adamw: Callable[..., torch.optim.Optimizer] = _ADAMW,
) -> torch.optim.Optimizer:
    """The optimizer ``args.optimizer_name``; weight decay acts on matrices, not on biases and norms.

    Args:
        adamw: the implementation of AdamW.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    rest = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer_name == "adamw_8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(_groups(trainable, args), **rest)
    if args.optimizer_name == "adafactor":
        return Adafactor(_groups(trainable, args), lr=args.learning_rate, scale_parameter=False, relative_step=False)
    if args.optimizer_name == "muon":
        inner = _layer_matrices(module)
        # Scaled so that its updates are as large as AdamW's (https://arxiv.org/abs/2502.16982), which has the same rate.
        muon = torch.optim.Muon(
            [p for p in trainable if p in inner],
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        outer = _groups([p for p in trainable if p not in inner], args)
        return CombinedOptimizer(muon, adamw(outer, **rest)) if outer else muon
    return adamw(_groups(trainable, args), **rest)


def _groups(parameters: list[nn.Parameter], args: TrainingArgs) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _layer_matrices(module: nn.Module) -> set[nn.Parameter]:
    """The trained matrices of ``module`` without embeddings and output head."""
    outside = {p for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    for part in module.modules():
        find_head: Any = getattr(part, "get_output_embeddings", None)
        head = None if find_head is None else find_head()
        outside |= set() if head is None else set(head.parameters())
    return {p for p in module.parameters() if p.requires_grad and p.ndim == 2} - outside


def make_scheduler(optimizer: torch.optim.Optimizer, args: TrainingArgs, total_steps: int) -> Any:
    """The schedule over ``total_steps``; ``warmup_steps`` wins over ``warmup_ratio``. The rate is a function of the step."""
    if args.lr_scheduler_type == "sequential":
        return LambdaLR(
            optimizer, partial(_sequential_factor, kwargs=args.lr_scheduler_kwargs, rate=args.learning_rate)
        )
    warmup = args.warmup_steps or int(args.warmup_ratio * total_steps + 0.5)
    if args.lr_scheduler_type == "megatron":
        factor = partial(
            _megatron_factor, rate=args.learning_rate, warmup=warmup, total=total_steps, **args.lr_scheduler_kwargs
        )
        return LambdaLR(optimizer, factor)
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


def _megatron_factor(
    step: int,
    rate: float,
    warmup: int,
    total: int,
    decay_style: str = "linear",
    decay_steps: int | None = None,
    min_lr: float = 0.0,
    warmup_init: float = 0.0,
    wsd_decay_style: str = "exponential",
    wsd_decay_steps: int | None = None,
) -> float:
    """The factor of the learning rate at ``step`` of Megatron-LM's schedule: linear warm-up from ``warmup_init``, then
    ``decay_style`` until ``decay_steps`` (all steps), then ``min_lr``. WSD is constant until its last ``wsd_decay_steps``.
    """
    end = total if decay_steps is None else decay_steps
    smallest, first = (min_lr / rate, warmup_init / rate) if rate else (0.0, 0.0)
    if step <= warmup and warmup > 0:
        return first + (1 - first) * step / warmup
    if decay_style == "constant":
        return 1.0
    if step > end:
        return smallest
    if decay_style == "inverse-square-root":
        return max(smallest, math.sqrt(max(warmup, 1) / max(step, 1)))
    begin, style = warmup, decay_style
    if decay_style == "WSD":
        begin, style = end - (wsd_decay_steps or 0), wsd_decay_style
    done = max(step - begin, 0) / max(end - begin, 1)
    return smallest + (1 - smallest) * _MEGATRON_DECAYS[style](done)


_MEGATRON_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "exponential": lambda done: 2 * 0.5**done - 1,
    "minus_sqrt": lambda done: 1 - math.sqrt(done),
}
"""What is left of the learning rate when a share of the decay is done, from 1 to 0."""


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
