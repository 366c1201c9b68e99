"""Megatron-LM's arguments of a hybrid of Mamba, attention and feed-forward layers as a ``NemotronHConfig``.

Names are those of Megatron's command line with ``_`` for ``-``, as in its checkpoints. What is not given has Megatron's
default. Megatron's ``pretrain_mamba.py`` builds these models (its ``MambaModel``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from limbeck.errors import LimbeckError
from limbeck.models.megatron_config import (
    canonical,
    not_written,
    query_groups,
    scale_output_projections,
    size,
    vocab_size,
    vocabulary_arguments,
)
from limbeck.models.recurrent_layers import recurrent_layers

MODEL_TYPE = "nemotron_h"
"""``model_type`` of the configurations of hybrids."""

_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
_MAMBA, _ATTENTION, _MLP = _KINDS

_FIXED: dict[str, tuple[Any, Any, str]] = {
    "normalization": ("LayerNorm", "RMSNorm", "RMSNorm"),
    "position_embedding_type": (
        "learned_absolute",
        "none",
        "none, without use_rotary_position_embeddings: Nemotron-H models in Transformers have no positions",
    ),
    "add_bias_linear": (True, False, "false (--disable-bias-linear)"),
    "untie_embeddings_and_output_weights": (False, True, "true"),
    "add_qkv_bias": (False, False, "false"),
    "qk_layernorm": (False, False, "false"),
    "swiglu": (False, False, "false"),
    "apply_layernorm_1p": (False, False, "false"),
    "multi_latent_attention": (False, False, "false"),
    "window_size": (None, None, "unset"),
    # The norm inside of Megatron's Mamba layers has this one in any case, and a NemotronHConfig has one for all.
    "norm_epsilon": (1e-5, 1e-5, "1e-5"),
}
"""Arguments of which only one value is possible: Megatron's default, this value, and how to write it."""

_STEPS = (1e-3, 0.1, 1e-4)
"""Of Megatron's Mamba layers: the range from which it draws steps, and the lower limit of what it draws."""

_CONVOLUTION = 4
"""Width of the convolutions of Megatron's Mamba layers."""

_NO_LIMIT = 1e-30
"""Transformers limits steps to ``time_step_min`` from below, also when it computes; Megatron does not."""


def hf_config(arguments: Mapping[str, Any], where: str) -> PretrainedConfig:
    """The configuration of the model that Megatron-LM builds from the ``arguments`` of a hybrid.

    Args:
        arguments: by name. Those that do not describe a model are ignored.
        where: the checkpoint or key with the arguments, for error messages.

    Raises:
        LimbeckError: if an argument is missing, has no valid value, or has no counterpart in Transformers.
    """
    given = {name: value for name, value in canonical(arguments).items() if value is not None}
    layers = layer_kinds(given, where)
    fixed = {**_FIXED, **({"squared_relu": (False, True, "true")} if "mlp" in layers else {})}
    for name, (default, possible, words) in fixed.items():
        if (value := given.get(name, default)) != possible:
            state = f"= {value}" if name in given else f"is not given and has Megatron's default, {value}, which"
            raise LimbeckError(
                f"{where}: {name} {state} cannot be expressed as a nemotron_h model; it must be {words}."
            )
    hidden, heads = size(given, "hidden_size", where), size(given, "num_attention_heads", where)
    head_dim = size(given, "mamba_head_dim", where, 64)
    config = AutoConfig.for_model(
        MODEL_TYPE,
        layers_block_type=layers,
        hidden_size=hidden,
        intermediate_size=size(given, "ffn_hidden_size", where, 4 * hidden),
        num_attention_heads=heads,
        num_key_value_heads=query_groups(given, heads, where),
        head_dim=size(given, "kv_channels", where, hidden // heads),
        mamba_num_heads=size(given, "mamba_num_heads", where, 2 * hidden // head_dim),
        mamba_head_dim=head_dim,
        n_groups=size(given, "mamba_num_groups", where, 8),
        ssm_state_size=size(given, "mamba_state_dim", where, 128),
        time_step_min=_NO_LIMIT,
        max_position_embeddings=size(given, "max_position_embeddings", where, given.get("seq_length")),
        layer_norm_epsilon=1e-5,
        initializer_range=float(given.get("init_method_std") or 0.02),
        vocab_size=vocab_size(given, where),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    for name, value, divisor, other in (
        ("num_attention_heads", heads, config.num_key_value_heads, "num_query_groups"),
        ("the number of heads of a Mamba layer", config.mamba_num_heads, config.n_groups, "mamba_num_groups"),
    ):
        if value % divisor:
            raise LimbeckError(f"{where}: {name} = {value} is not a multiple of {other} = {divisor}; correct one.")
    return config


def megatron_arguments(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments with which Megatron-LM builds the hybrid of ``config``, with names and values of its checkpoints.

    Raises:
        LimbeckError: if Megatron-LM has no arguments for this model.
    """
    symbols = {kind: symbol for symbol, kind in _KINDS.items()}
    other = sorted(set(config.layer_types) - symbols.keys())
    odd = {
        f"layers of the kind {', '.join(other)}": bool(other),
        "biases": config.attention_bias or config.mlp_bias or config.use_bias or config.mamba_proj_bias,
        "convolutions without biases": not config.use_conv_bias,
        f"mlp_hidden_act {config.mlp_hidden_act}": "mlp" in config.layer_types and config.mlp_hidden_act != "relu2",
        f"mamba_hidden_act {config.mamba_hidden_act}": config.mamba_hidden_act != "silu",
        f"conv_kernel {config.conv_kernel}": config.conv_kernel != _CONVOLUTION,
        f"layer_norm_epsilon {config.layer_norm_epsilon}": config.layer_norm_epsilon != 1e-5,
        "tied embeddings": config.tie_word_embeddings,
        "a sliding window": bool(getattr(config, "sliding_window", None)),
    }
    for what in (what for what, found in odd.items() if found):
        raise not_written(what)
    if config.time_step_min > _NO_LIMIT:
        warnings.warn(
            f"Transformers limits the steps of this model's Mamba layers to time_step_min = {config.time_step_min:g} from "
            "below, and Megatron-LM does not, so its outputs may differ.",
            stacklevel=2,
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return {
        "is_hybrid_model": True,
        "hybrid_override_pattern": "".join(symbols[kind] for kind in config.layer_types),
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": config.head_dim,
        "mamba_num_heads": config.mamba_num_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "mamba_num_groups": config.n_groups,
        "mamba_state_dim": config.ssm_state_size,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "position_embedding_type": "none",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": False,
        "normalization": "RMSNorm",
        "norm_epsilon": config.layer_norm_epsilon,
        "apply_layernorm_1p": False,
        "swiglu": False,
        "squared_relu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": True,
        "init_method_std": config.initializer_range,
        **vocabulary_arguments(config),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def layer_kinds(arguments: Mapping[str, Any], where: str) -> list[str]:
    """The kind of each layer in Transformers' words, from a pattern or, without one, from Megatron's rule for ratios.

    The rule: attention layers divide the Mamba layers into sections of equal length, with one before the first and one after
    the last. Then feed-forward layers take the place of Mamba layers at equal distances.
    """
    pattern = arguments.get("hybrid_layer_pattern") or arguments.get("hybrid_override_pattern")
    ratios = [float(arguments.get(f"hybrid_{kind}_ratio") or 0.0) for kind in ("attention", "mlp")]
    if not 0 <= min(ratios) <= sum(ratios) <= 1:
        raise LimbeckError(
            f"{where}: hybrid_attention_ratio = {ratios[0]:g} and hybrid_mlp_ratio = {ratios[1]:g} must be between 0 and 1, "
            "and so must be their sum; correct them."
        )
    if pattern is None:
        return [_KINDS[symbol] for symbol in _allocate(size(arguments, "num_layers", where), *ratios)]
    symbols = str(pattern).replace("|", "")  # which separates pipeline stages
    for symbol in symbols:
        if symbol not in _KINDS:
            raise LimbeckError(
                f"{where}: the hybrid pattern {pattern} has a layer {symbol}, and only M (Mamba), * (attention) and - "
                "(feed-forward) can be expressed; change the pattern."
            )
    count = size(arguments, "num_layers", where, len(symbols))
    if count != len(symbols):
        raise LimbeckError(
            f"{where}: the hybrid pattern {pattern} has {len(symbols)} layers, and num_layers is {count}; correct one of them."
        )
    return [_KINDS[symbol] for symbol in symbols]


def initialize(model: Any) -> None:
    """Change the random weights of a new hybrid to how Megatron-LM draws them."""
    scale_output_projections(model, per_layer=1)
    initialize_mamba(model)


@torch.no_grad()
def initialize_mamba(model: Any) -> None:
    """Draw the decays and steps of the Mamba layers of a new ``model`` as Megatron-LM does."""
    low, high, smallest = _STEPS
    for layer in recurrent_layers(model):
        steps = torch.empty_like(layer.dt_bias).uniform_(math.log(low), math.log(high)).exp().clamp(min=smallest)  # type: ignore[arg-type]
        layer.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # type: ignore[operator] # inverse of softplus
        layer.A_log.copy_(torch.empty_like(layer.A_log).uniform_(1, 16).log())  # type: ignore[operator, arg-type]


def _allocate(count: int, attention_ratio: float, mlp_ratio: float) -> list[str]:
    attention, mlps = round(count * attention_ratio), round(count * mlp_ratio)
    symbols = [_MAMBA] * count
    _place(symbols, _ATTENTION, (count - attention) / (attention + 1))
    if mlps:
        _place(symbols, _MLP, (count - attention - mlps) / mlps)
    return symbols


def _place(symbols: list[str], symbol: str, distance: float) -> None:
    """Put ``symbol`` in place of Mamba layers so that about ``distance`` Mamba layers remain before each."""
    left = distance
    for index, own in enumerate(symbols):
        if own != _MAMBA:
            continue
        if left < 0.5:
            symbols[index] = symbol
            left += distance
        else:
            left -= 1
