"""Estimators of the reverse KL from one token sampled from the student (Schulman, 2020, "Approximating KL divergence").

With r = log p − log q at that token: k1 = −r, k2 = r²/2, k3 = eʳ − 1 − r. The expectation of k1 and of k3 over the student's
samples is the reverse KL. Only the expected gradient of k2 is that of the reverse KL, so minimize k2. The expected gradient of
k1 is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Estimator = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]
"""(log p, log q) of the sampled tokens, each [rows, 1] → (value, ∂value/∂log q)."""


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


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3, "policy_gradient": k1}
"""By name. The gradient of ``policy_gradient`` is that of ``limbeck.objectives.policy_gradient``, with the advantage −k1."""
