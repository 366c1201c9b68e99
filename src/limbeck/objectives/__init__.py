"""Divergences and the fused head-and-loss. Knows tensors; knows no model, file or process."""

from limbeck.objectives.cross_tokenizer import CrossTokenizer, cross_tokenizer_distillation
from limbeck.objectives.divergences import divergence, names, needs_vocab_reduction, register
from limbeck.objectives.features import FeatureLosses, feature_loss, modelopt_balance
from limbeck.objectives.fused import (
    DistillationLoss,
    Objective,
    OutputHead,
    compiler_found,
    fused_linear_distillation,
)
from limbeck.objectives.payloads import TAILS, Logits, Sampled, TopK
from limbeck.objectives.spans import Spans, Vocabularies
from limbeck.objectives.taid import TaidSchedule
from limbeck.objectives.teacher_outputs import compute_logits, compute_topk
from limbeck.objectives.vocab_parallel import VocabParallel, VocabReducer, take_rows

__all__ = [
    "TAILS",
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
    "VocabReducer",
    "Vocabularies",
    "compiler_found",
    "compute_logits",
    "compute_topk",
    "cross_tokenizer_distillation",
    "divergence",
    "feature_loss",
    "fused_linear_distillation",
    "modelopt_balance",
    "names",
    "needs_vocab_reduction",
    "register",
    "take_rows",
]
