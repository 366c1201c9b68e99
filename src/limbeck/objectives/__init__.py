"""Divergences and the fused head-and-loss. Knows tensors; knows no model, file or process."""

from limbeck.objectives.across import Across, VocabParallel, take_rows
from limbeck.objectives.cross_tokenizer import CrossTokenizer, Spans, Vocabularies, cross_tokenizer_distillation
from limbeck.objectives.divergences import coupled, divergence, load_file, names, register
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
    "CrossTokenizer",
    "DistillationLoss",
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
    "fused_linear_distillation",
    "load_file",
    "names",
    "register",
    "take_rows",
]
