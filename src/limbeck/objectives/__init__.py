"""Divergences and the fused head-and-loss. Knows tensors; knows no model, file or process."""

from limbeck.objectives.across import Across, VocabParallel, take_rows
from limbeck.objectives.divergences import coupled, divergence, names, register
from limbeck.objectives.features import FeatureLosses, feature_loss, modelopt_balance
from limbeck.objectives.fused import (
    DistillationLoss,
    Objective,
    OutputHead,
    compiler_found,
    fused_linear_distillation,
)
from limbeck.objectives.signals import TAILS, Logits, Sampled, TopK
from limbeck.objectives.taid import TaidSchedule

__all__ = [
    "TAILS",
    "Across",
    "DistillationLoss",
    "FeatureLosses",
    "Logits",
    "Objective",
    "OutputHead",
    "Sampled",
    "TaidSchedule",
    "TopK",
    "VocabParallel",
    "compiler_found",
    "coupled",
    "divergence",
    "feature_loss",
    "fused_linear_distillation",
    "modelopt_balance",
    "names",
    "register",
    "take_rows",
]
