"""Activation checkpointing: less memory between the passes for one more forward pass."""

from __future__ import annotations

from typing import Any


def recompute_activations(model: Any, *, use_reentrant: bool = False) -> None:
    """Activation checkpointing: keep the layers' inputs in the forward pass and recompute the rest in the backward
    pass.
    """
    settings = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name of the same thing
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
