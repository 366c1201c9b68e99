"""Hugging Face causal language models: loaded, taken apart at the output head, adapted and saved. Knows no loss, no cluster."""

from limbeck.models.freeze import freeze
from limbeck.models.heads import (
    body,
    check_head,
    check_length,
    check_packing,
    decoder_layers,
    hidden_states,
    output_head,
)
from limbeck.models.load import load_model, load_tokenizer, model_limits, recompute_activations
from limbeck.models.lora import add_lora, has_lora, merged_state_dict

__all__ = [
    "add_lora",
    "body",
    "check_head",
    "check_length",
    "check_packing",
    "decoder_layers",
    "freeze",
    "has_lora",
    "hidden_states",
    "load_model",
    "load_tokenizer",
    "merged_state_dict",
    "model_limits",
    "output_head",
    "recompute_activations",
]
