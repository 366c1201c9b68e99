"""Refuses Hugging Face models that Megatron cannot be built as."""

from __future__ import annotations

import warnings
from typing import Any

from limbeck.config.schema import MegatronConfig
from limbeck.errors import LimbeckError
from limbeck.models import body, unwrap_model
from limbeck.models.megatron_families import ExpertShape, Heads, layers_with_experts
from limbeck.strategies.megatron.bridge import find_family
from limbeck.strategies.parallel_dims import ParallelDims


def check_family(model: Any, dims: ParallelDims, name: str, role: str) -> None:
    """Raise LimbeckError unless Megatron can be built as the Hugging Face model ``name`` and divided so."""
    causal = unwrap_model(model)
    config, section = causal.config, f"{role}.strategy_args"
    try:
        family = find_family(model)
    except LimbeckError as error:
        raise LimbeckError(f"{section}.strategy_name = megatron: {name}: {error}") from error
    known = {source for parameter in family.parameters(causal) for source in parameter.sources}
    odd = known ^ set(causal.state_dict())
    activation = getattr(config, "mlp_hidden_act" if family.hybrid else "hidden_act", None)
    dropout = {key: getattr(config, key, 0) for key in ("attention_dropout", "hidden_dropout")}
    other = {
        f"the parameter {min(odd, default='')}, which differs from other {config.model_type} models": bool(odd),
        f"{'mlp_' if family.hybrid else ''}hidden_act = {activation}": not family.settings
        and activation != family.activation,
        f"mamba_hidden_act = {getattr(config, 'mamba_hidden_act', None)}": family.hybrid
        and config.mamba_hidden_act != "silu",
        "tied embeddings": family.hybrid and config.tie_word_embeddings,
        **{f"{key} = {value:g}": value > 0 for key, value in dropout.items()},
        "RoPE scaling that depends on the length or scales attention": not family.hybrid
        and _has_unusual_rope(body(causal)),
        f"attn_implementation = {config._attn_implementation}": not config._attn_implementation.startswith(
            ("sdpa", "flash_attention")
        ),
        "router_jitter_noise": bool(getattr(config, "router_jitter_noise", 0)),
    }
    for what in (what for what, found in other.items() if found):
        raise LimbeckError(f"{name} has {what}, which is not built for megatron; use fsdp2_train and fsdp2_infer.")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise LimbeckError(
            f"{name} has a sliding window of {config.sliding_window} tokens, which is not built for megatron; if no row is "
            f"longer, set {role}.model_args.model_config_kwargs: {{sliding_window: null}}, else use fsdp2_train and "
            "fsdp2_infer."
        )
    if family.hybrid and dims.cp > 1:
        raise LimbeckError(
            f"{section}.strategy_config.context_parallel_size = {dims.cp}: {name} has recurrent layers (Mamba), which need "
            "whole rows; remove the key."
        )
    _check_experts(causal, dims, name, role)
    heads = Heads.of(config)
    dense = {"feed-forward columns": config.intermediate_size} if not all(layers_with_experts(causal)) else {}
    mamba = {}
    if heads.mamba is not None:
        mamba = {"heads of Mamba layers": heads.mamba.heads, "groups of Mamba layers": heads.mamba.groups}
    # Megatron gives several ranks the same key head: they slice its matrix evenly and gather what they compute with it.
    shares = dims.tp % heads.groups == 0 and not any(x % dims.tp for x in (heads.heads, 2 * heads.groups * heads.dim))
    keys = {} if shares else {"key and value heads": heads.groups}
    for what, size in {**keys, **dense, **mamba}.items():
        if size % dims.tp:
            raise LimbeckError(
                f"{section}.strategy_config.tensor_model_parallel_size = {dims.tp} does not divide the {size} {what} of "
                f"{name}; use a divisor, or fsdp2_train and fsdp2_infer."
            )
    query, key = heads.heads // dims.tp, max(heads.groups // dims.tp, 1)
    if query % dims.cp or (key % dims.cp and dims.cp % key):
        raise LimbeckError(
            f"{section}.strategy_config.context_parallel_size = {dims.cp} does not divide the {query} attention heads ({key} "
            f"of keys and values) of a tensor parallel rank of {name}; use a size that divides both, or a multiple of {key} "
            f"that divides {query}."
        )


def warn_of_unread_keys(model: Any, given: MegatronConfig, name: str, role: str) -> None:
    """Warn of the keys that only experts read, for a Hugging Face ``model`` without experts, and of modules to recompute that
    no layer has."""
    section, with_experts = f"{role}.strategy_args.strategy_config", layers_with_experts(unwrap_model(model))
    keys = [key for key in MegatronConfig.model_fields if key.startswith(("moe_", "expert_"))]
    unread = [key for key in keys if getattr(given, key) != MegatronConfig.model_fields[key].default]
    if unread and not any(with_experts):
        have = "have" if len(unread) > 1 else "has"
        warnings.warn(f"{section}: {', '.join(unread)} {have} no effect: {name} has no experts.", stacklevel=2)
    absent = {
        "moe": "has no experts" if not any(with_experts) else "",
        "mlp": "has experts in every layer" if all(with_experts) else "",
        "layernorm": "has no norm that Transformer Engine computes alone" if not any(with_experts) else "",
    }
    read = given.recompute_modules if role == "student" and given.recompute_granularity == "selective" else None
    for module in read or ():
        if absent.get(module):
            warnings.warn(
                f"{section}.recompute_modules: {module} has no effect: {name} {absent[module]}.", stacklevel=2
            )


def _check_experts(model: Any, dims: ParallelDims, name: str, role: str) -> None:
    """Raise LimbeckError unless the experts of the Hugging Face ``model``, if any, can be divided so."""
    config, section = model.config, f"{role}.strategy_args.strategy_config"
    experts, count = ExpertShape.of(config), sum(layers_with_experts(model))
    if experts is None or count == 0:
        if dims.ep > 1:
            raise LimbeckError(
                f"{section}.expert_model_parallel_size = {dims.ep} divides experts, and {name} (model_type "
                f"{config.model_type}) has none; remove it."
            )
        return
    if experts.normalized and experts.active == 1:
        raise LimbeckError(
            f"{name} has num_experts_per_tok = 1 with normalized weights, which trains no router and is not built for "
            "megatron; use fsdp2_train and fsdp2_infer."
        )
    if dims.tp > 1 and not dims.sequence_parallel:
        raise LimbeckError(
            f"{section}.sequence_parallel: tensor parallel ranks would route the same tokens of {name} several times; set it "
            "to true."
        )
    for key, ranks, size, what in (
        ("expert_model_parallel_size", dims.ep, experts.count, "experts"),
        ("expert_tensor_parallel_size", dims.etp, experts.width, "feed-forward columns of an expert"),
    ):
        if size % ranks:
            raise LimbeckError(f"{section}.{key} = {ranks} does not divide the {size} {what} of {name}; use a divisor.")


def _has_unusual_rope(trunk: Any) -> bool:
    rotary = getattr(trunk, "rotary_emb", None)
    return rotary is None or rotary.rope_type not in ("default", "linear", "llama3") or rotary.attention_scaling != 1
