"""Divergences and the fused head-and-loss. Knows tensors; knows no model, file or process."""

from limbeck.objectives.across import Across, VocabParallel, take_rows
from limbeck.objectives.cross_tokenizer import CrossTokenizer, cross_tokenizer_distillation
from limbeck.objectives.divergences import coupled, divergence, names, register
from limbeck.objectives.features import FeatureLosses, feature_loss, modelopt_balance
from limbeck.objectives.fused import (
    DistillationLoss,
    Objective,
    OutputHead,
    compiler_found,
    fused_linear_distillation,
)
from limbeck.objectives.say import likeliest, whole_logits
from limbeck.objectives.signals import TAILS, Logits, Sampled, TopK
from limbeck.objectives.spans import Spans, Vocabularies
from limbeck.objectives.taid import TaidSchedule

__all__ = [
    "TAILS",
    "Across",
    "CrossTokenizer",
    "DistillationLoss",
    "FeatureLosses",
    "Logits",
    "Objective",
    "OutputHead",
    "Sampled",
    "Spans",
    "TaidSchedule",
    "TopK",
    "VocabParallel",
    "Vocabularies",
    "compiler_found",
    "coupled",
    "cross_tokenizer_distillation",
    "divergence",
    "feature_loss",
    "fused_linear_distillation",
    "likeliest",
    "modelopt_balance",
    "names",
    "register",
    "take_rows",
    "whole_logits",
]
