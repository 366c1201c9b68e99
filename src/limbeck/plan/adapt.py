"""Decides what a configuration leaves open, from a plan of a step on the run's own GPUs.

Activations are recomputed, and the student writes in lockstep, only if memory requires it, because both take longer.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from limbeck.config import DistillConfig
from limbeck.errors import UnknownMemory
from limbeck.plan.copied_weights import leaves_copy_open, with_copy
from limbeck.plan.estimate import Plan, make_plan
from limbeck.plan.gpus import GPUS
from limbeck.strategies.world import World
from limbeck.train.build.student import with_recomputation

_KEY = "student.model_args.disable_gradient_checkpointing"


_COPY = "rollout.generator_kwargs.copy"


def adapt(config: DistillConfig, world: World) -> DistillConfig:
    """``config`` with both decisions made, the same on every rank."""
    return choose_recomputation(choose_copy(config, world), world)


def choose_copy(config: DistillConfig, world: World, memory: float | None = None) -> DistillConfig:
    """``config`` with ``rollout.generator_kwargs.copy`` set, if that is auto and the student trains on GPUs.

    Every rank writes with a copy of the student's weights if that fits beside a step, or if its memory is unknown, and in
    lockstep otherwise. The choice is the same on every rank.

    Args:
        memory: bytes of one GPU; by default of this process's.
    """
    memory = _gpu_memory(world) if memory is None else memory
    if memory is None or not leaves_copy_open(config):
        return config
    copied = with_copy(config, copy=True)
    try:
        plan = _plan_here(copied, world, memory)
    except UnknownMemory:
        return copied
    if not world.max(not plan.fits):
        return copied
    if world.is_main:
        print(
            f"note: the student writes in lockstep on all ranks, because a step beside a copy of its weights {_needs(plan)} "
            f"(set {_COPY})",
            file=sys.stderr,
        )
    return with_copy(config, copy=False)


def choose_recomputation(config: DistillConfig, world: World, memory: float | None = None) -> DistillConfig:
    """``config`` with ``disable_gradient_checkpointing`` set, if that is unset and the student trains on GPUs.

    The student's step is planned without recomputation. If that does not fit, or cannot be planned, activations are
    recomputed. The choice is the same on every rank.

    Args:
        memory: bytes of one GPU; by default of this process's.
    """
    if config.student.model_args.disable_gradient_checkpointing is not None:
        return config
    memory = _gpu_memory(world) if memory is None else memory
    if memory is None:
        return config
    kept = with_recomputation(config, recompute=False)
    try:
        plan = _plan_here(kept, world, memory)
        fits, reason = plan.fits, f"a step that keeps them {_needs(plan)}"
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


def _gpu_memory(world: World) -> float | None:
    """Bytes of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_properties(world.device).total_memory if world.device.type == "cuda" else None


def _plan_here(config: DistillConfig, world: World, memory: float) -> Plan:
    """The plan of a step on the devices of the run, each with ``memory`` bytes."""
    return make_plan(config, 1, 1 + max(_devices(config, world.size)), replace(GPUS["H100"], memory=memory))


def _needs(plan: Plan) -> str:
    gib = 2**30
    return f"needs about {plan.needed / gib:.1f} GiB, and a GPU has {plan.usable / gib:.1f} GiB"
