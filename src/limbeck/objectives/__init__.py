"""Distillation losses on tensors: divergences, the fused output head and loss, features, cross-tokenizer loss."""

from limbeck.objectives.compilation import compiler_found
from limbeck.objectives.cross_tokenizer import cross_tokenizer_distillation
from limbeck.objectives.divergences import divergence, make_divergence, names, needs_vocab_reduction, register
from limbeck.objectives.features import FeatureLosses, feature_loss, modelopt_balance
from limbeck.objectives.fused import fused_linear_distillation
from limbeck.objectives.objective import DistillationLoss, Objective
from limbeck.objectives.output_head import OutputHead
from limbeck.objectives.payloads import TAILS, Logits, Sampled, SignalPayload, TopK
from limbeck.objectives.policy_gradient import RolloutTokens
from limbeck.objectives.span_divergence import CrossTokenizer
from limbeck.objectives.spans import Spans, Vocabularies
from limbeck.objectives.taid import TaidSchedule
from limbeck.objectives.teacher_outputs import compute_logits, compute_sampled, compute_topk
from limbeck.objectives.vocab_parallel import VocabParallel, VocabReducer, take_rows

__all__ = [
    "TAILS",
    "CrossTokenizer",
    "DistillationLoss",
    "FeatureLosses",
    "Logits",
    "Objective",
    "OutputHead",
    "RolloutTokens",
    "Sampled",
    "SignalPayload",
    "Spans",
    "TaidSchedule",
    "TopK",
    "VocabParallel",
    "VocabReducer",
    "Vocabularies",
    "compiler_found",
    "compute_logits",
    "compute_sampled",
    "compute_topk",
    "cross_tokenizer_distillation",
    "divergence",
    "feature_loss",
    "fused_linear_distillation",
    "make_divergence",
    "modelopt_balance",
    "names",
    "needs_vocab_reduction",
    "register",
    "take_rows",
]
