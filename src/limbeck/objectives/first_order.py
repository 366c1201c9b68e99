"""Backward passes that are formed with the forward pass and cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from limbeck.errors import LimbeckError


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of a ``torch.autograd.Function`` so that ``create_graph=True`` raises LimbeckError.

    ``once_differentiable`` raises only if the incoming gradient requires a gradient. Otherwise it returns tensors without a
    graph, and second-order terms would be missing from a larger sum without an error.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # the autograd engine enables it in a backward pass only for create_graph=True
            raise LimbeckError(
                "the losses of limbeck.objectives have first-order gradients only; call backward() or torch.autograd.grad() "
                "without create_graph=True."
            )
        return backward(ctx, *grads)

    return run
