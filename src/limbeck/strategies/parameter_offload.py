"""Parameters of a frozen model that stay in host memory and are copied to the device for the forward pass of their layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def keep_on_host(
    module: nn.Module, parameters: Iterable[nn.Parameter], device: torch.device
) -> frozenset[nn.Parameter]:
    """Move ``module`` to ``device`` without ``parameters``, which are returned."""
    kept = frozenset(parameters)
    module._apply(lambda tensor: tensor if tensor in kept else tensor.to(device))
    return kept


def copy_in_forward(module: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> frozenset[nn.Parameter]:
    """Move ``module`` to ``device`` without the parameters of ``layers``, which are there during the forward pass only.

    Returns:
        The parameters that stay in host memory; pinned if the device is a GPU, so that copies do not block.
    """
    layers = list(layers)
    kept = keep_on_host(module, (parameter for layer in layers for parameter in layer.parameters()), device)
    on_host: dict[nn.Parameter, Tensor] = {
        parameter: parameter.data.pin_memory() if device.type == "cuda" else parameter.data for parameter in kept
    }

    def fetch(layer: nn.Module, args: Any) -> None:
        for parameter in layer.parameters():
            parameter.data = on_host[parameter].to(device, non_blocking=True, copy=True)

    def release(layer: nn.Module, args: Any, output: Any) -> None:
        for parameter in layer.parameters():
            parameter.data = on_host[parameter]

    for layer in layers:
        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(release)
    return kept
