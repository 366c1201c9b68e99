"""Activation checkpointing: less memory between the passes for one more forward pass."""

from __future__ import annotations

from typing import Any

from limbeck.config import DistillConfig


def recompute_activations(model: Any, *, use_reentrant: bool = False) -> None:
    """Activation checkpointing: keep the layers' inputs in the forward pass and recompute the rest in the backward
    pass.
    """
    settings = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name of the same thing
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def recomputes_activations(config: DistillConfig, device_type: str) -> bool:
    """Whether activation checkpointing is on. Where nothing has decided: on GPUs, where memory runs out first."""
    disabled = config.student.model_args.disable_gradient_checkpointing
    return device_type == "cuda" if disabled is None else not disabled
