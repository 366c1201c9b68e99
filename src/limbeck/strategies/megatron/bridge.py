"""Architectures that ``megatron_families`` has no table for, as NVIDIA's Megatron-Bridge describes them.

Of Bridge only its descriptions are used: which parameters of Hugging Face's are in which of Megatron's and how, and the
settings of the architecture. Models are built, loaded, trained and streamed here as those with tables: Bridge itself
converts whole models, in the layers of Transformer Engine.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformers.activations import ACT2FN

from limbeck.errors import LimbeckError
from limbeck.models import unwrap_model
from limbeck.models.megatron_families import (
    EMBEDDINGS,
    FAMILIES,
    HEAD,
    Family,
    Kind,
    Rule,
    layers_with_experts,
    local_name,
    rules_of_experts,
)

# fmt: off
_TAKEN = frozenset((
    "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit", "activation_func",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "softmax_scale", "num_moe_experts", "moe_router_topk",
    "moe_ffn_hidden_size", "moe_router_pre_softmax", "moe_router_score_function", "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk", "moe_router_dtype",
    "moe_shared_expert_intermediate_size",
))
"""Settings of the architecture, which are passed to Megatron as Bridge has them."""

_OTHERWISE = frozenset((
    # From the Hugging Face configuration, the modules of the Hugging Face model, or the run's configuration.
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size",
    "seq_length", "share_embeddings_and_output_weights", "rotary_base", "rotary_percent", "rope_scaling",
    "rope_scaling_factor", "moe_layer_freq", "bf16", "fp16", "params_dtype", "autocast_dtype", "moe_grouped_gemm",
    "moe_token_dispatcher_type", "hidden_dropout", "attention_dropout",
    # Without an effect on what is computed here: initial values, kernels, losses that are no part of distillation.
    "init_method_std", "make_vocab_size_divisible_by", "hf_model_id", "hf_model_revision", "attention_backend",
    "persist_layer_norm", "attention_softmax_in_fp32", "apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion",
    "masked_softmax_fusion", "cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "gradient_accumulation_fusion",
    "deallocate_pipeline_outputs", "moe_permute_fusion", "moe_shared_expert_overlap", "moe_router_load_balancing_type",
    "moe_router_bias_update_rate", "moe_aux_loss_coeff", "moe_z_loss_coeff", "mtp_num_layers", "mtp_loss_scaling_factor",
    # Checked by themselves.
    "position_embedding_type", "transformer_layer_spec",
))
"""Settings that are not passed on. A change of any other is an error."""
# fmt: on

_SCALES_EMBEDDINGS = "GemmaModelProvider"
"""The provider that only adds to a model what ``MegatronBody`` reads from the Hugging Face model's embeddings."""


def find_family(model: Any) -> Family:
    """The family of a Hugging Face model: from the tables, or from Megatron-Bridge.

    Raises:
        LimbeckError: if Bridge has none, is not installed, or describes what cannot be built here.
    """
    causal = unwrap_model(model)
    found = FAMILIES.get(causal.config.model_type)
    return _bridged(causal) if found is None else found


def _bridged(causal: Any) -> Family:
    model_type = causal.config.model_type
    with _quiet():  # about what it could not import, and kernels that are not used here
        bridge = _bridge_of(causal)
        try:
            provider = bridge.provider_bridge(SimpleNamespace(config=causal.config))
            mappings = bridge.mapping_registry()
        except Exception as error:  # of one of many architectures
            raise LimbeckError(
                f"Megatron-Bridge cannot describe this {model_type} model ({type(error).__name__}: {error}); use fsdp2_train "
                "and fsdp2_infer."
            ) from error
    for problem in _problems(causal, provider):
        raise LimbeckError(
            f"Megatron-Bridge describes {model_type} models with {problem}, which Limbeck cannot build in megatron-core's "
            "GPTModel; use fsdp2_train and fsdp2_infer."
        )
    settings = {name: getattr(provider, name) for name in _TAKEN if getattr(provider, name, None) is not None}
    return Family(_rules(causal, mappings), qk_norm=provider.qk_layernorm, settings=settings)


def _bridge_of(causal: Any) -> Any:
    """Bridge's object for the class of a Hugging Face model."""
    missing = f"no weight map for model_type {causal.config.model_type}, only for {', '.join(FAMILIES)}"
    try:
        import megatron.bridge
        from megatron.bridge.models.conversion.model_bridge import get_model_bridge
    except Exception as error:  # of the many packages that it imports
        raise LimbeckError(
            f"{missing}, and Megatron-Bridge, which has others, cannot be imported ({error}); install megatron-bridge and "
            "Transformer Engine, or use fsdp2_train and fsdp2_infer."
        ) from error
    try:
        return get_model_bridge(type(causal), hf_config=causal.config)
    except NotImplementedError as error:
        raise LimbeckError(
            f"{missing}, and Megatron-Bridge {megatron.bridge.__version__} has none either; use fsdp2_train and fsdp2_infer."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings below an error, and with the logging that was configured before."""
    root, disabled = logging.root, logging.root.manager.disable
    before = root.level, root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(before[0])
        root.handlers[:] = before[1]


def _problems(causal: Any, provider: Any) -> Iterator[str]:
    """What of Bridge's settings cannot be built here, in words."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    if not isinstance(provider, GPTModelProvider):
        yield f"a {type(provider).__name__}"
        return
    if type(provider).provide is not GPTModelProvider.provide and type(provider).__name__ != _SCALES_EMBEDDINGS:
        yield f"layers of its own ({type(provider).__name__})"
    layers = provider.transformer_layer_spec
    if getattr(layers, "func", layers) not in (default_layer_spec, get_gpt_decoder_block_spec):
        yield f"layers of its own ({getattr(layers, '__name__', layers)})"
    if provider.position_embedding_type != "rope":
        yield f"position_embedding_type = {provider.position_embedding_type}"
    defaults = {field.name: _default(field) for field in dataclasses.fields(GPTModelProvider)}
    for name in (field.name for field in dataclasses.fields(provider)):
        value = getattr(provider, name)
        changed = value != defaults[name] if name in defaults else value not in (None, False)
        if changed and not name.startswith("_") and name not in _TAKEN | _OTHERWISE:
            yield f"{name} = {value}"
    config, function = causal.config, provider.activation_func
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    points = torch.linspace(-6, 6, 97)
    if activation not in ACT2FN or not torch.allclose(ACT2FN[activation](points), function(points), atol=1e-5):
        yield f"the activation {function.__name__} for hidden_act = {activation}"
    gated = provider.gated_linear_unit and not provider.add_bias_linear and function is torch.nn.functional.silu
    if any(layers_with_experts(causal)) and not gated:
        yield f"experts that are not gated by SiLU without biases (hidden_act = {activation})"


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _rules(causal: Any, mappings: Any) -> dict[str, Rule]:
    """The table that ``mappings`` of Bridge's are for a Hugging Face model; of experts, that of the other families."""
    from megatron.bridge.models.conversion import param_mapping as bridge

    kinds: dict[type, Kind | None] = {
        bridge.QKVMapping: "qkv",
        bridge.GatedMLPMapping: "gate_up",
        bridge.RowParallelMapping: "row",
        bridge.ReplicatedMapping: "copy",
        bridge.ColumnParallelMapping: "column",
        bridge.AutoMapping: None,  # by its name; Bridge looks at the module
    }
    held, layers = set(causal.state_dict()), range(causal.config.num_hidden_layers)
    rules: dict[str, Rule] = {}
    for mapping in mappings:
        sources = mapping.hf_param if isinstance(mapping.hf_param, dict) else {"": mapping.hf_param}
        if ".mlp.experts." in mapping.megatron_param or not any(
            {source.replace("*", str(layer)) for source in sources.values()} <= held for layer in layers
        ):
            continue  # of parts that this model does not have, such as biases
        if type(mapping) not in kinds or getattr(mapping, "permute_dims", None):
            raise LimbeckError(
                f"Megatron-Bridge makes {mapping.megatron_param} of {causal.config.model_type} models by a "
                f"{type(mapping).__name__}, which Limbeck does not know; use fsdp2_train and fsdp2_infer."
            )
        names = tuple(sources[key] for key in ("q", "k", "v", "gate", "up", "") if key in sources)
        name = local_name(mapping.megatron_param)
        rules[name] = Rule(kinds[type(mapping)] or _kind(name), names)
    if any(layers_with_experts(causal)):
        rules |= rules_of_experts()
    ends = {"embedding.word_embeddings.weight": EMBEDDINGS, "output_layer.weight": HEAD}
    return rules | {name: Rule("vocabulary", (source,)) for name, source in ends.items()}


def _kind(name: str) -> Kind:
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return "row"
    return "column" if name.endswith(("linear_fc1.weight", "linear_fc1.bias")) else "copy"
