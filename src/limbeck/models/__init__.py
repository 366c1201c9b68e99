"""Hugging Face causal language models: loaded, taken apart at the output head, adapted and saved. Knows no loss, no
cluster.
"""

from limbeck.models.freeze import freeze
from limbeck.models.heads import (
    attention_for,
    body,
    check_head,
    check_length,
    decoder_layers,
    hidden_states,
    keep_documents_apart,
    output_head,
    unwrapped,
)
from limbeck.models.load import (
    ModelSource,
    load_model,
    load_tokenizer,
    model_limits,
    model_outline,
    recompute_activations,
)
from limbeck.models.lora import add_lora, has_lora, merged_state_dict
from limbeck.models.memory import available_memory, explain_oom
from limbeck.models.taps import NamedPair, Taps, check_logit_layer, resolve_pairs, submodules

__all__ = [
    "ModelSource",
    "NamedPair",
    "Taps",
    "add_lora",
    "attention_for",
    "available_memory",
    "body",
    "check_head",
    "check_length",
    "check_logit_layer",
    "decoder_layers",
    "explain_oom",
    "freeze",
    "has_lora",
    "hidden_states",
    "keep_documents_apart",
    "load_model",
    "load_tokenizer",
    "merged_state_dict",
    "model_limits",
    "model_outline",
    "output_head",
    "recompute_activations",
    "resolve_pairs",
    "submodules",
    "unwrapped",
]
