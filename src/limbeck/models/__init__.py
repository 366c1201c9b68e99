"""Hugging Face causal language models: loading, output heads, hidden-state capture, varlen attention, freezing and LoRA."""

import limbeck.models.logs  # noqa: F401  (before anything that imports transformers)
from limbeck.models.activation_checkpointing import recompute_activations, recomputes_activations
from limbeck.models.compile import compile_layers, should_compile, undo_around
from limbeck.models.freeze import freeze, select_trained
from limbeck.models.heads import (
    attending_within,
    body,
    check_head,
    check_length,
    decoder_layers,
    enable_varlen_attention,
    hidden_states,
    output_head,
    unwrap_model,
    use_eager_on_cpu,
)
from limbeck.models.hidden_state_capture import (
    HiddenStateCapture,
    NamedPair,
    check_logit_layer,
    resolve_pairs,
    submodules,
)
from limbeck.models.load import (
    ModelSource,
    end_token_ids,
    load_model,
    load_tokenizer,
    model_limits,
    model_outline,
)
from limbeck.models.lora import add_lora, has_lora, iter_merged
from limbeck.models.memory import available_memory, explain_oom
from limbeck.models.recurrent_layers import recurrent_layers
from limbeck.models.varlen_attention import causal_mask, current_documents

__all__ = [
    "HiddenStateCapture",
    "ModelSource",
    "NamedPair",
    "add_lora",
    "attending_within",
    "available_memory",
    "body",
    "causal_mask",
    "check_head",
    "check_length",
    "check_logit_layer",
    "compile_layers",
    "current_documents",
    "decoder_layers",
    "enable_varlen_attention",
    "end_token_ids",
    "explain_oom",
    "freeze",
    "has_lora",
    "hidden_states",
    "iter_merged",
    "load_model",
    "load_tokenizer",
    "model_limits",
    "model_outline",
    "output_head",
    "recompute_activations",
    "recomputes_activations",
    "recurrent_layers",
    "resolve_pairs",
    "select_trained",
    "should_compile",
    "submodules",
    "undo_around",
    "unwrap_model",
    "use_eager_on_cpu",
]
