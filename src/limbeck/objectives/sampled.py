"""Estimators of the reverse KL from the one token that the student has drawn (Schulman, 2020).

With r = log p − log q at that token: k1 = −r, k2 = r²/2, k3 = eʳ − 1 − r. In expectation over the student's draws k1 and k3
are the reverse KL; of the gradients only k2's is, which is why k2 is the one to minimise (k1's has expectation 0).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Estimator = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]
"""(log p, log q) of the drawn tokens, each [rows, 1] → (value, ∂value/∂log q)."""


def k1(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log q − log p."""
    return log_q - log_p, torch.ones_like(log_q)


def k2(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(log q − log p)² / 2."""
    gap = log_q - log_p
    return gap.square() / 2, gap


def k3(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """p/q − 1 − (log p − log q)."""
    gap = log_p - log_q
    return torch.expm1(gap) - gap, -torch.expm1(gap)


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}
