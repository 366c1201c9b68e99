"""Decides what a configuration leaves open, from a plan of a step on the run's own GPUs.

Activations are recomputed, and the student writes in lockstep, only if memory requires it, because both take longer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch

from limbeck.config import DistillConfig
from limbeck.errors import UnknownMemory
from limbeck.plan.copied_weights import leaves_copy_open, with_copy
from limbeck.plan.estimate import Plan, make_plan
from limbeck.plan.gpus import GPUS
from limbeck.strategies.world import World
from limbeck.train.build.student import with_recomputation

_RECOMPUTES, _COPIES = "student.model_args.disable_gradient_checkpointing", "rollout.generator_kwargs.copy"
_SLOTS = "rollout.generator_kwargs.slots"


def adapt(config: DistillConfig, world: World, memory: float | None = None) -> DistillConfig:
    """``config`` with ``disable_gradient_checkpointing`` and ``rollout.generator_kwargs.copy`` set, where these are unset or
    auto and the student trains on GPUs.

    The student's step is planned with the faster choices first: all activations and a copy of the weights that writes, then
    without the former, then without the latter. The first that fits is taken, and the last is not planned. If the memory of a
    step is unknown, activations are recomputed and a copy writes. The choice is the same on every rank.

    Args:
        memory: bytes of one GPU; by default of this process's.
    """
    if memory is None:
        if world.device.type != "cuda":
            return config
        memory = torch.cuda.get_device_properties(world.device).total_memory
    copies = (True, False) if leaves_copy_open(config) else (None,)
    recomputes = (False, True) if config.student.model_args.disable_gradient_checkpointing is None else (None,)
    *choices, last = [_Choice(copy, recompute) for copy in copies for recompute in recomputes]
    chosen, reasons = last, {}
    for choice in choices:
        try:
            gpu = replace(GPUS["H100"], memory=memory)
            # Under `auto` a short run is not compiled, which takes more memory.
            compiled = config.compile_model is True
            plan = make_plan(choice.of(config), 1, 1 + max(_devices(config, world.size)), gpu, compiled=compiled)
        except UnknownMemory as error:
            chosen = _Choice(copies[0], recomputes[-1])
            reasons[_Choice(copies[0], recomputes[0])] = f"needs memory of unknown size: {error}"
            break
        if not world.max(not plan.fits):
            chosen = choice
            break
        reasons[choice] = _reason(plan)
    if world.is_main:
        _explain(chosen, reasons)
    return chosen.of(config)


@dataclass(frozen=True)
class _Choice:
    """copy: of the weights, for writing. recompute: activations. None stays as it is configured."""

    copy: bool | None
    recompute: bool | None

    def of(self, config: DistillConfig) -> DistillConfig:
        config = config if self.copy is None else with_copy(config, copy=self.copy)
        return config if self.recompute is None else with_recomputation(config, recompute=self.recompute)


def _explain(chosen: _Choice, reasons: dict[_Choice, str]) -> None:
    """Print what was chosen and is slower, with the plan that does not fit."""
    if chosen.copy is False:
        reason = [why for choice, why in reasons.items() if choice.copy][-1]
        _note(
            f"the student writes in lockstep on all ranks, because a step beside a copy of its weights {reason}",
            _COPIES,
        )
    if chosen.recompute:
        reason = reasons[replace(chosen, recompute=False)]
        _note(f"activations are recomputed in the backward pass, because a step that keeps them {reason}", _RECOMPUTES)


def _note(sentence: str, key: str) -> None:
    print(f"note: {sentence} (set {key})", file=sys.stderr)


def _devices(config: DistillConfig, ranks: int) -> list[int]:
    teacher = config.teacher.device_mapping if config.needs_worker_groups else None
    return [*(config.device_mapping or range(ranks)), *(teacher or [])]


def _reason(plan: Plan) -> str:
    gib, fullest = 2**30, max(plan.groups, key=lambda group: group.step.total)
    cache = fullest.step.peak.get("cache")
    part = f", of which a cache of keys and values takes {cache / gib:.1f} GiB ({_SLOTS})" if cache else ""
    return f"needs about {plan.needed / gib:.1f} GiB{part}, and a GPU has {plan.usable / gib:.1f} GiB"
