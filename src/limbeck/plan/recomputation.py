"""Decides whether a run recomputes activations: only if they do not fit on its GPUs, because recomputing takes longer."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from limbeck.config import DistillConfig
from limbeck.errors import UnknownMemory
from limbeck.plan.estimate import Plan, make_plan
from limbeck.plan.gpus import GPUS
from limbeck.strategies.world import World
from limbeck.train.build.student import with_recomputation

_KEY = "student.model_args.disable_gradient_checkpointing"


def choose_recomputation(config: DistillConfig, world: World, memory: float | None = None) -> DistillConfig:
    """``config`` with ``disable_gradient_checkpointing`` set, if that is unset and the student trains on GPUs.

    The student's step is planned without recomputation. If that does not fit, or cannot be planned, activations are
    recomputed. The choice is the same on every rank.

    Args:
        memory: bytes of one GPU; by default of this process's.
    """
    if config.student.model_args.disable_gradient_checkpointing is not None:
        return config
    if memory is None:
        if world.device.type != "cuda":
            return config
        memory = torch.cuda.get_device_properties(world.device).total_memory
    kept = with_recomputation(config, recompute=False)
    try:
        plan = make_plan(kept, 1, 1 + max(_devices(config, world.size)), replace(GPUS["H100"], memory=memory))
        fits, reason = plan.fits, _reason(plan)
    except UnknownMemory as error:
        fits, reason = False, f"the memory of a step is unknown: {error}"
    if not world.max(not fits):
        return kept
    if world.is_main:
        print(f"note: activations are recomputed in the backward pass, because {reason} (set {_KEY})", file=sys.stderr)
    return with_recomputation(config, recompute=True)


def _devices(config: DistillConfig, ranks: int) -> list[int]:
    teacher = config.teacher.device_mapping if config.needs_worker_groups else None
    return [*(config.device_mapping or range(ranks)), *(teacher or [])]


def _reason(plan: Plan) -> str:
    gib = 2**30
    return f"a step that keeps them needs about {plan.needed / gib:.1f} GiB, and a GPU has {plan.usable / gib:.1f} GiB"
