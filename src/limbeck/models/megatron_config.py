"""Megatron-LM's arguments of a model as a Hugging Face configuration, and the inverse.

Names are those in Megatron-LM's checkpoints, which are those of its command line with ``_`` for ``-``. What is not given has
Megatron's default. A model without biases is a ``llama``, one with biases of queries, keys and values a ``qwen2``, and one
with norms of queries and keys a ``qwen3``. Layer norms, learned positions and other architectures are errors.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from limbeck.errors import LimbeckError
from limbeck.models.megatron_families import ExpertShape
from limbeck.models.megatron_pattern import layer_pattern

_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "normalization": ("LayerNorm", ("RMSNorm",)),
    "position_embedding_type": ("learned_absolute", ("rope",)),
    "swiglu": (False, (True,)),
    "add_bias_linear": (True, (False,)),
    "rotary_percent": (1.0, (1,)),
    "rotary_interleaved": (False, (False,)),
    "apply_layernorm_1p": (False, (False,)),
    "apply_residual_connection_post_layernorm": (False, (False,)),
    "attention_output_gate": (False, (False,)),
    "qk_l2_norm": (False, (False,)),
    "softmax_type": ("vanilla", ("vanilla",)),
    "glu_linear_offset": (0.0, (0,)),
    "activation_func_clamp_value": (None, (None,)),
    "window_size": (None, (None,)),
    "no_rope_freq": (None, (None,)),
    "squared_relu": (False, (False,)),
    "quick_geglu": (False, (False,)),
    "openai_gelu": (False, (False,)),
    "mtp_num_layers": (None, (None, 0)),
    "multi_latent_attention": (False, (False,)),
    "experimental_attention_variant": (None, (None,)),
    "heterogeneous_layers_config_path": (None, (None,)),
    "heterogeneous_layers_config_encoded_json": (None, (None,)),
}
"""Arguments of which only some values are possible: Megatron's default, and these values."""

_SIZES = ("num_layers", "hidden_size", "num_attention_heads")
_OTHERS = (
    *("ffn_hidden_size", "group_query_attention", "num_query_groups", "kv_channels", "max_position_embeddings"),
    *("seq_length", "rotary_base", "rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor"),
    *("norm_epsilon", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights", "init_method_std"),
    *("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by", "tokenizer_type", "tokenizer_model"),
)
_EXPERTS: dict[str, tuple[Any, ...]] = {
    "num_experts": (),
    "moe_router_topk": (),
    "moe_ffn_hidden_size": (),
    "moe_router_pre_softmax": (None, False, True),
    "moe_layer_freq": (),
    "moe_latent_size": (None,),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_num_groups": (None,),
    "moe_router_enable_expert_bias": (None, False),
}
"""Arguments of experts, and the values of those of which only some are possible."""

_HYBRID = (
    *(
        "hybrid_override_pattern",
        "hybrid_layer_pattern",
        "hybrid_attention_ratio",
        "hybrid_mlp_ratio",
        "is_hybrid_model",
    ),
    *("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"),
)
_SYNONYMS = {
    "disable_bias_linear": ("add_bias_linear", lambda value: not value),
    "layernorm_epsilon": ("norm_epsilon", lambda value: value),
    "use_rotary_position_embeddings": (
        "position_embedding_type",
        lambda value: "rope" if value else "learned_absolute",
    ),
}
"""Other names of arguments, on the command line or in megatron-core: the name in checkpoints, and the value there."""

ARGUMENTS = (*_SIZES, *_OTHERS, *_FIXED, *_EXPERTS, *_HYBRID, *_SYNONYMS)
"""The arguments that describe a model."""

_LLAMA3_POSITIONS = 8192
"""Positions of the model that Megatron's use_rope_scaling extends, which is a constant there."""

_PADDING = 128
"""Megatron's default of make_vocab_size_divisible_by."""

_KINDS = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
"""The models, without hybrids, that Megatron-LM has arguments for."""


def not_written(what: str) -> LimbeckError:
    """The error for a model that Megatron-LM does not have."""
    return LimbeckError(
        f"a model with {what} cannot be written as a checkpoint of Megatron-LM; keep Hugging Face's, and in a run set "
        "checkpoint_config.save_megatron: false."
    )


def check_names(arguments: Mapping[str, Any], where: str) -> None:
    """Raise LimbeckError unless all names are in ``ARGUMENTS``. where: the key with the arguments, for the error."""
    for name in arguments:
        if name not in ARGUMENTS:
            near = difflib.get_close_matches(str(name), ARGUMENTS, 1)
            hint = f"; is {near[0]} meant?" if near else "; remove it."
            raise LimbeckError(f"{where}.{name} is no argument of Megatron-LM that describes a model{hint}")


def canonical(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` that describe a model, under the names in checkpoints; the others are left out."""
    found = {name: arguments[name] for name in ARGUMENTS if name in arguments and name not in _SYNONYMS}
    for name, (target, convert) in _SYNONYMS.items():
        # A checkpoint has both use_rotary_position_embeddings: false and position_embedding_type: rope.
        if arguments.get(name) is not None and not (arguments[name] is False and target in found):
            found[target] = convert(arguments[name])
    return found


def hf_config(arguments: Mapping[str, Any], where: str) -> PretrainedConfig:
    """The Hugging Face configuration of the model that Megatron-LM builds from ``arguments``.

    The vocabulary is ``vocab_size`` (and one more with a NullTokenizer, as in Megatron-LM) or else
    ``padded_vocab_size``. Arguments that do not describe a model are ignored.

    Args:
        arguments: by name, as in Megatron-LM's checkpoints; names of its command line and of megatron-core are accepted.
        where: the checkpoint or key with the arguments, for error messages.

    Raises:
        LimbeckError: if an argument is missing, has no valid value, or has no counterpart in Transformers.
    """
    given = canonical(arguments)
    layers, hidden, heads = (size(given, name, where) for name in _SIZES)
    for name, (default, possible) in _FIXED.items():
        value = _or(given.get(name), default)
        if value not in possible:
            state = (
                f"= {value}"
                if given.get(name) is not None
                else f"is not given and has Megatron's default, {value}, which"
            )
            raise LimbeckError(
                f"{where}: {name} {state} cannot be expressed as a llama, qwen2 or qwen3 model; it must be "
                f"{' or '.join(_yaml(one) for one in possible)}; other models need a checkpoint of Hugging Face."
            )
    if given.get("kv_channels") is None and hidden % heads:
        raise LimbeckError(
            f"{where}: hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}; correct one."
        )
    channels = size(given, "kv_channels", where, hidden // heads)
    groups = query_groups(given, heads, where)
    for name, value, divisor, of in (
        ("num_attention_heads", heads, groups, "num_query_groups"),
        ("kv_channels", channels, 2, "rotary positions"),
    ):
        if value % divisor:
            raise LimbeckError(
                f"{where}: {name} = {value} is not a multiple of {divisor}, as {of} require; correct one."
            )
    bias, norms = bool(given.get("add_qkv_bias")), bool(given.get("qk_layernorm"))
    if bias and norms:
        raise LimbeckError(
            f"{where}: add_qkv_bias and qk_layernorm together are neither a qwen2 nor a qwen3 model; at most one may be true."
        )
    width = size(given, "ffn_hidden_size", where, 4 * hidden * 2 // 3 // 64 * 64)
    kind, experts = "qwen3" if norms else "qwen2" if bias else "llama", dict[str, Any]()
    if given.get("num_experts"):
        kind, experts = _experts(given, where, kind, width, layers)
    return AutoConfig.for_model(
        kind,
        num_hidden_layers=layers,
        hidden_size=hidden,
        **{"intermediate_size": width, **experts},
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=channels,
        max_position_embeddings=size(given, "max_position_embeddings", where, given.get("seq_length")),
        rope_parameters=_rope(given, where),
        rms_norm_eps=_number(given, "norm_epsilon", where, 1e-5),
        tie_word_embeddings=not given.get("untie_embeddings_and_output_weights"),
        initializer_range=_number(given, "init_method_std", where, 0.02),
        vocab_size=vocab_size(given, where),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def megatron_arguments(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments with which Megatron-LM builds the model of ``config``, with names and values of its checkpoints.

    Raises:
        LimbeckError: if Megatron-LM has no arguments for this model.
    """
    if config.model_type not in _KINDS:  # others may lack what is read below
        raise not_written(f"model_type {config.model_type}")
    rope = dict(config.rope_parameters)
    kind, bias = rope.get("rope_type", "default"), getattr(config, "attention_bias", False)
    odd = {
        "biases": bias or getattr(config, "mlp_bias", False),
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        f"RoPE scaling {kind}": kind not in ("default", "linear", "llama3"),
        "RoPE scaling that differs from Llama 3's": kind == "llama3"
        and (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])
        != (1, 4, _LLAMA3_POSITIONS),
        "a sliding window": bool(
            getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        ),
    }
    experts = _expert_arguments(config)
    odd["one expert for each token"] = experts.get("moe_router_topk") == 1 and not experts["moe_router_pre_softmax"]
    for what in (what for what, found in odd.items() if found):
        raise not_written(what)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(rope["rope_theta"]) if float(rope["rope_theta"]).is_integer() else rope["rope_theta"],
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": rope["factor"] if kind == "linear" else None,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": rope["factor"] if kind == "llama3" else 8.0,
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "apply_layernorm_1p": False,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": config.model_type == "qwen2",
        "qk_layernorm": config.model_type in ("qwen3", "qwen3_moe"),
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "init_method_std": config.initializer_range,
        **vocabulary_arguments(config),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **experts,
    }


def vocabulary_arguments(config: PretrainedConfig) -> dict[str, Any]:
    """Megatron's arguments of the vocabulary, with the rows that it adds."""
    return {
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": _PADDING,
        "padded_vocab_size": -(-config.vocab_size // _PADDING) * _PADDING,
    }


def _expert_arguments(config: PretrainedConfig) -> dict[str, Any]:
    shape = ExpertShape.of(config)
    if shape is None:
        return {}
    dense, step = getattr(config, "mlp_only_layers", None) or [], getattr(config, "decoder_sparse_step", 1)
    pattern = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(config.num_hidden_layers)]
    return {
        "num_experts": shape.count,
        "moe_ffn_hidden_size": shape.width,
        "moe_router_topk": shape.active,
        "moe_router_pre_softmax": not shape.normalized,
        "moe_router_score_function": "softmax",
        "moe_layer_freq": 1 if all(pattern) else pattern,
        "moe_grouped_gemm": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def is_hybrid(arguments: Mapping[str, Any]) -> bool:
    """Whether ``arguments`` describe a hybrid, see ``megatron_hybrid_config``."""
    keys = (
        "is_hybrid_model",
        "hybrid_layer_pattern",
        "hybrid_override_pattern",
        "hybrid_attention_ratio",
        "hybrid_mlp_ratio",
    )
    return any(arguments.get(key) for key in keys)


@torch.no_grad()
def scale_output_projections(model: Any, per_layer: int = 2) -> None:
    """Divide the random weights of the last projections of attention, feed-forward and Mamba by the square root of their
    number, as Megatron-LM initialises them (``scaled_init_method_normal``). per_layer: how many a layer has.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "experts.down_proj")):
            parameter.mul_((per_layer * model.config.num_hidden_layers) ** -0.5)


def _experts(given: Mapping[str, Any], where: str, kind: str, width: int, layers: int) -> tuple[str, dict[str, Any]]:
    """The ``model_type`` of a model of ``kind`` with experts, and its keys of experts."""
    for name, possible in _EXPERTS.items():
        if possible and (value := given.get(name)) not in possible:
            raise LimbeckError(
                f"{where}: {name} = {value} cannot be expressed as a mixtral or qwen3_moe model; it must be "
                f"{' or '.join(_yaml(one) for one in possible if one is not None) or 'unset'}."
            )
    count, active = size(given, "num_experts", where), size(given, "moe_router_topk", where, 2)
    width, normalized = size(given, "moe_ffn_hidden_size", where, width), not given.get("moe_router_pre_softmax")
    if active > count:
        raise LimbeckError(f"{where}: moe_router_topk = {active} is more than num_experts = {count}; correct one.")
    dense = _dense_layers(given, where, layers)
    if kind == "qwen3":
        keys = {"num_experts": count, "moe_intermediate_size": width, "norm_topk_prob": normalized}
        return "qwen3_moe", {**keys, "num_experts_per_tok": active, "mlp_only_layers": dense}
    if kind == "llama" and normalized and not dense:
        return "mixtral", {"num_local_experts": count, "intermediate_size": width, "num_experts_per_tok": active}
    name = "add_qkv_bias" if kind == "qwen2" else "moe_layer_freq" if dense else "moe_router_pre_softmax"
    remedy = "" if kind == "qwen2" else ", or set qk_layernorm, which makes it a qwen3_moe"
    raise LimbeckError(
        f"{where}: {name} = {_yaml(given[name])} with num_experts is neither a mixtral nor a qwen3_moe model; remove "
        f"it{remedy}."
    )


def _dense_layers(given: Mapping[str, Any], where: str, layers: int) -> list[int]:
    """The layers without experts. Megatron's ``moe_layer_freq`` is the distance of those with experts, or 0 or 1 for each."""
    pattern = _or(given.get("moe_layer_freq"), 1)
    if isinstance(pattern, str):
        with suppress(ValueError):
            pattern = layer_pattern(pattern)
    if type(pattern) is int and pattern > 0:
        pattern = [int(layer % pattern == 0) for layer in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers or not {1} <= set(pattern) <= {0, 1}:
        raise LimbeckError(
            f"{where}: moe_layer_freq = {given['moe_layer_freq']} must be a whole number above 0, or a list of 0 and 1 for "
            f"each of {layers} layers, with some 1, such as [0]+[1]*{max(layers - 1, 1)}; correct it."
        )
    return [layer for layer, has_experts in enumerate(pattern) if not has_experts]


def query_groups(given: Mapping[str, Any], heads: int, where: str) -> int:
    """The number of heads of keys and values: Megatron-LM has one for all queries if group_query_attention is true without
    num_query_groups, and ignores that if it is false. Where it is not given, as in files of NeMo, num_query_groups counts.
    """
    grouped = given.get("group_query_attention")
    return size(given, "num_query_groups", where, 1 if grouped else heads) if grouped in (None, True) else heads


def vocab_size(given: Mapping[str, Any], where: str) -> int:
    """The number of tokens of the model that the canonical arguments ``given`` describe."""
    tokens = size(given, "vocab_size", where, given.get("padded_vocab_size"))
    # The end token of a NullTokenizer comes after its vocabulary.
    return tokens + (given.get("vocab_size") is not None and given.get("tokenizer_type") == "NullTokenizer")


def _rope(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    base = {"rope_theta": _number(given, "rotary_base", where, 10000)}
    if given.get("use_rope_scaling"):
        scaling = {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": _LLAMA3_POSITIONS,
        }
        return {"rope_type": "llama3", "factor": _number(given, "rope_scaling_factor", where, 8), **scaling, **base}
    if given.get("rotary_seq_len_interpolation_factor") is not None:
        return {
            "rope_type": "linear",
            "factor": _number(given, "rotary_seq_len_interpolation_factor", where, 1),
            **base,
        }
    return {"rope_type": "default", **base}


def size(given: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """The argument ``name``, or ``default``. Raises LimbeckError unless it is a whole number above 0."""
    value = _or(given.get(name), default)
    if value is None:
        raise LimbeckError(f"{where}: {name} is missing; set it in model_args.megatron_arguments.")
    if type(value) is not int or value < 1:
        raise LimbeckError(f"{where}: {name} = {value} must be a whole number above 0; correct it.")
    return value


def _number(given: Mapping[str, Any], name: str, where: str, default: float) -> float:
    value = _or(given.get(name), default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise LimbeckError(f"{where}: {name} = {value} must be a number above 0; correct it.")
    return float(value)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
