"""Output heads: the linear layer that maps hidden states to logits, with an optional bias, scale and soft-cap.

Shapes: V vocabulary, H hidden size, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.errors import LimbeckError


@dataclass(frozen=True)
class LogitTransform:
    """The elementwise part of an output head: ``softcap · tanh(scale · (z + bias) / softcap)`` for products z = h Wᵀ."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the logits [n, V] of the products z [n, V] in ``dtype``. bias: [V] in ``dtype``, or None."""
        z = z.to(dtype)
        if bias is not None:
            z = z + bias
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@dataclass(frozen=True)
class OutputHead:
    """An output head: logits = ``softcap · tanh(scale · (h Wᵀ + b) / softcap)``.

    Args:
        weight: [V, H]. It may have rows beyond the shared vocabulary (padding). They are never computed.
        bias: [V] or None. −∞ excludes a token: its probability is 0.
        softcap: the final soft-cap of Gemma models, or None.
        scale: the logit scale of Cohere and Granite models.

    Raises LimbeckError if ``softcap`` is not positive or ``bias`` does not fit ``weight``.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise LimbeckError(f"softcap must be above 0, or None if the model has none; got {self.softcap}.")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise LimbeckError(
                f"an output head's bias is [V], one number for each row of its weight [V, H]; got {list(self.bias.shape)} "
                f"beside {list(self.weight.shape)}."
            )

    @property
    def transform(self) -> LogitTransform:
        """The elementwise part of the head."""
        return LogitTransform(self.scale, self.softcap)


def as_output_head(role: str, head: Tensor | OutputHead) -> OutputHead:
    """Return ``head`` as an ``OutputHead``. ``role`` (student or teacher) names it in the LimbeckError for other types."""
    if isinstance(head, OutputHead):
        return head
    if not isinstance(head, Tensor):
        raise LimbeckError(
            f"{role}_head must be a weight matrix [V, H] or an OutputHead, got {type(head).__name__}; for a layer pass "
            "OutputHead(layer.weight, layer.bias)."
        )
    return OutputHead(head)
