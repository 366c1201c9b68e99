"""Divergences and the fused head-and-loss. Knows tensors; knows no model, file or process."""

from limbeck.objectives.divergences import divergence, names, register
from limbeck.objectives.features import FeatureLosses, feature_loss, modelopt_balance
from limbeck.objectives.fused import DistillationLoss, Objective, OutputHead, fused_linear_distillation

__all__ = [
    "DistillationLoss",
    "FeatureLosses",
    "Objective",
    "OutputHead",
    "divergence",
    "feature_loss",
    "fused_linear_distillation",
    "modelopt_balance",
    "names",
    "register",
]
