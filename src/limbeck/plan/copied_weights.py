"""The copy of the student's weights with which each rank writes: whether a run has one, and its size."""

from __future__ import annotations

from limbeck.config import DistillConfig
from limbeck.config.schema.rollout_rules import lockstep_obstacle
from limbeck.rollout.student import writing_dtype


def copies_weights(config: DistillConfig) -> bool:
    """Whether the generator ``hf`` writes with a copy of the student's weights; with ``copy: auto`` too."""
    rollout = config.rollout
    if rollout is None or rollout.generator != "hf" or rollout.in_lockstep:
        return False
    return "student" in rollout.origins or config.effective_validation.rollout is not None


def leaves_copy_open(config: DistillConfig) -> bool:
    """Whether the memory of the GPUs decides between a copy and lockstep."""
    is_auto = config.rollout is not None and config.rollout.generator_kwargs.get("copy", "auto") == "auto"
    return is_auto and copies_weights(config) and lockstep_obstacle(config) is None


def with_copy(config: DistillConfig, *, copy: bool) -> DistillConfig:
    """``config`` with ``rollout.generator_kwargs.copy`` set."""
    assert config.rollout is not None
    arguments = {**config.rollout.generator_kwargs, "copy": copy}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"generator_kwargs": arguments})})


def add_copy(config: DistillConfig, peak: dict[str, int], most: dict[str, int], parameters: int, device: str) -> None:
    """Add the copy to the bytes ``peak`` and ``most`` of a step, by tag. An offloaded copy is not beside activations.

    parameters: number of the student's parameters. device: type of the devices.
    """
    if not copies_weights(config):
        return
    assert config.rollout is not None
    most["copy"] = parameters * writing_dtype(device).itemsize
    if not (config.rollout.offload or config.offloads_colocated):
        peak["copy"] = most["copy"]
        return
    held = ("parameters", "optimizer", "teacher", "copy")
    writing: dict[str, int] = {tag: most[tag] for tag in held if tag in most}
    if sum(writing.values()) > sum(peak.values()):
        peak.clear()
        peak.update(writing)
