"""Divergences and the fused head-and-loss. Knows tensors; knows no model, file or process."""

from limbeck.objectives.divergences import divergence, names, register
from limbeck.objectives.fused import DistillationLoss, Objective, OutputHead, fused_linear_distillation

__all__ = [
    "DistillationLoss",
    "Objective",
    "OutputHead",
    "divergence",
    "fused_linear_distillation",
    "names",
    "register",
]
