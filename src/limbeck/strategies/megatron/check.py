"""Refuses Hugging Face models that Megatron cannot be built as."""

from __future__ import annotations

from typing import Any

from limbeck.errors import LimbeckError
from limbeck.models import body, unwrap_model
from limbeck.models.megatron_families import FAMILIES, Heads
from limbeck.strategies.parallel_dims import ParallelDims


def check_family(model: Any, dims: ParallelDims, name: str, role: str) -> None:
    """Raise LimbeckError unless Megatron can be built as the Hugging Face model ``name`` and divided so."""
    causal = unwrap_model(model)
    config, section = causal.config, f"{role}.strategy_args"
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise LimbeckError(
            f"{section}.strategy_name: megatron has no weight map for {name} (model_type {config.model_type}), only for "
            f"{', '.join(FAMILIES)}; use fsdp2_train and fsdp2_infer."
        )
    expected = {
        source.replace("*", str(layer))
        for rule in family.rules.values()
        for source in rule.sources
        for layer in range(config.num_hidden_layers)
    }
    odd = expected ^ {name for name, _ in causal.named_parameters(remove_duplicate=False)}
    other = {
        f"the parameter {min(odd, default='')}, which differs from other {config.model_type} models": bool(odd),
        f"hidden_act = {config.hidden_act}": config.hidden_act != "silu",
        f"attention_dropout = {config.attention_dropout:g}": config.attention_dropout > 0,
        "RoPE scaling that depends on the length or scales attention": _has_unusual_rope(body(causal)),
        f"attn_implementation = {config._attn_implementation}": not config._attn_implementation.startswith(
            ("sdpa", "flash_attention")
        ),
    }
    for what in (what for what, found in other.items() if found):
        raise LimbeckError(f"{name} has {what}, which is not built for megatron; use fsdp2_train and fsdp2_infer.")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise LimbeckError(
            f"{name} has a sliding window of {config.sliding_window} tokens, which is not built for megatron; if no row is "
            f"longer, set {role}.model_args.model_config_kwargs: {{sliding_window: null}}, else use fsdp2_train and "
            "fsdp2_infer."
        )
    heads = Heads.of(config)
    for what, size in (("key and value heads", heads.groups), ("feed-forward columns", config.intermediate_size)):
        if size % dims.tp:
            raise LimbeckError(
                f"{section}.strategy_config.tensor_model_parallel_size = {dims.tp} does not divide the {size} {what} of "
                f"{name}; use a divisor, or fsdp2_train and fsdp2_infer."
            )


def _has_unusual_rope(trunk: Any) -> bool:
    rotary = trunk.rotary_emb
    return rotary.rope_type not in ("default", "linear", "llama3") or rotary.attention_scaling != 1
