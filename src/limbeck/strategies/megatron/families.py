"""How the parameters of Megatron's GPTModel are made of those of a Hugging Face model, one small table per family.

Megatron joins queries, keys and values in one matrix, group of heads by group of heads, and the gate and up projections
in another, gate first on each rank. It slices matrices over tensor-parallel ranks and pads the vocabulary to a multiple
of their number. Optimizer moments have the shapes of their parameters and are converted alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.models import body, unwrap_model
from limbeck.strategies.parallel_dims import ParallelDims

Kind = Literal["vocabulary", "copy", "qkv", "gate_up", "row", "column", "mamba_in", "mamba_conv"]

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One parameter of Megatron's: ``kind`` is how it is divided, ``sources`` are the Hugging Face tensors in it.

    ``*`` is the number of the layer. layers: the kind of layer (of ``layer_types``) that has it; None for all.
    """

    kind: Kind
    sources: tuple[str, ...]
    layers: str | None = None


@dataclass(frozen=True)
class Family:
    """An architecture. rules: parameter of Megatron's to how it is made. qkv_bias, qk_norm: what Megatron must build.

    activation: of feed-forward layers, which have a gate unless it is ``relu2``. hybrid: each layer is either a Mamba layer,
    attention or a feed-forward layer, by the configuration's ``layer_types``, and there are no position embeddings.
    """

    rules: dict[str, Rule]
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    hybrid: bool = False


_LAYER, _ATTENTION, _MLP = "model.layers.*.", "model.layers.*.self_attn.", "model.layers.*.mlp."
_OURS = "decoder.layers.*."

_LLAMA: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Rule("vocabulary", (EMBEDDINGS,)),
    f"{_OURS}input_layernorm.weight": Rule("copy", (f"{_LAYER}input_layernorm.weight",)),
    f"{_OURS}self_attention.linear_qkv.weight": Rule("qkv", tuple(f"{_ATTENTION}{x}_proj.weight" for x in "qkv")),
    f"{_OURS}self_attention.linear_proj.weight": Rule("row", (f"{_ATTENTION}o_proj.weight",)),
    f"{_OURS}pre_mlp_layernorm.weight": Rule("copy", (f"{_LAYER}post_attention_layernorm.weight",)),
    f"{_OURS}mlp.linear_fc1.weight": Rule("gate_up", (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight")),
    f"{_OURS}mlp.linear_fc2.weight": Rule("row", (f"{_MLP}down_proj.weight",)),
    "decoder.final_layernorm.weight": Rule("copy", ("model.norm.weight",)),
    "output_layer.weight": Rule("vocabulary", (HEAD,)),
}
_QKV_BIAS = {
    f"{_OURS}self_attention.linear_qkv.bias": Rule("qkv", tuple(f"{_ATTENTION}{x}_proj.bias" for x in "qkv")),
}
_QK_NORM = {
    f"{_OURS}self_attention.{x}_layernorm.weight": Rule("copy", (f"{_ATTENTION}{x}_norm.weight",)) for x in "qk"
}

_MIXER = f"{_LAYER}mixer."


def _hybrid(layers: str, rules: dict[str, tuple[Kind, tuple[str, ...]]]) -> dict[str, Rule]:
    return {f"{_OURS}{name}": Rule(kind, sources, layers) for name, (kind, sources) in rules.items()}


_NEMOTRON_H: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Rule("vocabulary", ("model.embeddings.weight",)),
    **_hybrid(
        "linear_attention",
        {
            "norm.weight": ("copy", (f"{_LAYER}norm.weight",)),
            "mixer.in_proj.weight": ("mamba_in", (f"{_MIXER}in_proj.weight",)),
            "mixer.conv1d.weight": ("mamba_conv", (f"{_MIXER}conv1d.weight",)),
            "mixer.conv1d.bias": ("mamba_conv", (f"{_MIXER}conv1d.bias",)),
            "mixer.norm.weight": ("column", (f"{_MIXER}norm.weight",)),
            "mixer.out_proj.weight": ("row", (f"{_MIXER}out_proj.weight",)),
            **{f"mixer.{x}": ("column", (f"{_MIXER}{x}",)) for x in ("dt_bias", "A_log", "D")},
        },
    ),
    **_hybrid(
        "full_attention",
        {
            "input_layernorm.weight": ("copy", (f"{_LAYER}norm.weight",)),
            "self_attention.linear_qkv.weight": ("qkv", tuple(f"{_MIXER}{x}_proj.weight" for x in "qkv")),
            "self_attention.linear_proj.weight": ("row", (f"{_MIXER}o_proj.weight",)),
        },
    ),
    **_hybrid(
        "mlp",
        {
            "pre_mlp_layernorm.weight": ("copy", (f"{_LAYER}norm.weight",)),
            "mlp.linear_fc1.weight": ("column", (f"{_MIXER}up_proj.weight",)),
            "mlp.linear_fc2.weight": ("row", (f"{_MIXER}down_proj.weight",)),
        },
    ),
    "decoder.final_layernorm.weight": Rule("copy", ("model.norm_f.weight",)),
    "output_layer.weight": Rule("vocabulary", (HEAD,)),
}
"""In a checkpoint of Megatron's MambaModel, the last norm is ``decoder.final_norm``, and Transformer Engine's layers hold the
norm of a layer as ``layer_norm_weight`` of its first matrix: ``mixer.in_proj``, ``self_attention.linear_qkv``,
``mlp.linear_fc1``.
"""

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA),
    "mistral": Family(_LLAMA),
    "qwen2": Family(_LLAMA | _QKV_BIAS, qkv_bias=True),
    "qwen3": Family(_LLAMA | _QK_NORM, qk_norm=True),
    "nemotron_h": Family(_NEMOTRON_H, activation="relu2", hybrid=True),
}
"""``model_type`` of a Hugging Face configuration to its family."""


@dataclass(frozen=True)
class MambaSizes:
    """Of a whole Mamba-2 layer. dim: of a head. groups: of heads that share the inputs and outputs of their states.

    state: of a channel. width: of the convolution. chunk: positions that are computed together. smallest_step: below which
    no step is. eps: of the norm before the output projection.
    """

    heads: int
    dim: int
    groups: int
    state: int
    width: int
    chunk: int
    smallest_step: float
    eps: float

    @classmethod
    def of(cls, config: Any) -> MambaSizes:
        """Those of a Hugging Face configuration."""
        return cls(
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.n_groups,
            config.ssm_state_size,
            config.conv_kernel,
            config.chunk_size,
            config.time_step_min,
            config.layer_norm_epsilon,
        )

    def sections(self, kind: Kind) -> list[int]:
        """Rows of the parts of the input projection (gate, x, B, C, steps) or of the convolution (x, B, C)."""
        convolved = [self.heads * self.dim, self.groups * self.state, self.groups * self.state]
        return [self.heads * self.dim, *convolved, self.heads] if kind == "mamba_in" else convolved


@dataclass(frozen=True)
class Heads:
    """Attention heads of a whole model. groups: of key and value heads. dim: of one head. mamba: of its Mamba layers."""

    heads: int
    groups: int
    dim: int
    mamba: MambaSizes | None = None

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Those of a Hugging Face configuration."""
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        mamba = MambaSizes.of(config) if FAMILIES[config.model_type].hybrid else None
        return cls(heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads, mamba)


def padded_rows(vocab_size: int, ranks: int) -> int:
    """Rows of embeddings and head in Megatron, the same number on each of ``ranks``."""
    return -(-vocab_size // ranks) * ranks


def slice_of(kind: Kind, tensors: Sequence[Tensor], heads: Heads, rank: int, ranks: int) -> Tensor:
    """The part of tensor-parallel ``rank`` of ``ranks`` of the parameter that is made of whole ``tensors``."""
    if kind == "copy":
        return tensors[0]
    if kind == "row":
        return tensors[0].chunk(ranks, 1)[rank]
    if kind in ("mamba_in", "mamba_conv"):
        assert heads.mamba is not None
        return torch.cat([x.chunk(ranks)[rank] for x in tensors[0].split(heads.mamba.sections(kind))])
    if kind == "vocabulary":
        (table,) = tensors
        missing = padded_rows(len(table), ranks) - len(table)
        return torch.nn.functional.pad(table, (0, 0, 0, missing)).chunk(ranks)[rank]
    if kind in ("gate_up", "column"):
        return torch.cat([x.chunk(ranks)[rank] for x in tensors])
    groups = [x.unflatten(0, (heads.groups, -1)) for x in tensors]  # per group: its queries, its key, its value
    return torch.cat(groups, 1).flatten(0, 1).chunk(ranks)[rank]


def joined(kind: Kind, slices: Sequence[Tensor], heads: Heads, vocab_size: int) -> list[Tensor]:
    """The inverse of ``slice_of``: whole tensors from the parts of all ranks."""
    if kind == "copy":
        return [slices[0]]
    if kind == "row":
        return [torch.cat(list(slices), 1)]
    if kind == "column":
        return [torch.cat(list(slices))]
    if kind in ("mamba_in", "mamba_conv"):
        assert heads.mamba is not None
        sections = [size // len(slices) for size in heads.mamba.sections(kind)]
        return [torch.cat([torch.cat(parts) for parts in zip(*(x.split(sections) for x in slices), strict=True)])]
    if kind == "vocabulary":
        return [torch.cat(list(slices))[:vocab_size]]
    if kind == "gate_up":
        return [torch.cat(parts) for parts in zip(*(x.chunk(2) for x in slices), strict=True)]
    groups = torch.cat(list(slices)).unflatten(0, (heads.groups, -1))
    sizes = [heads.heads // heads.groups * heads.dim, heads.dim, heads.dim]
    return [x.flatten(0, 1) for x in groups.split(sizes, 1)]


def family_of(model: Any) -> Family:
    """The family of a Hugging Face model that ``check_family`` has accepted."""
    return FAMILIES[unwrap_model(model).config.model_type]


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
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    expected = {
        source.replace("*", str(layer))
        for rule in family.rules.values()
        for source in rule.sources
        for layer, kind in enumerate(kinds)
        if rule.layers in (None, kind)
    }
    odd = expected ^ {name for name, _ in causal.named_parameters(remove_duplicate=False)}
    activation = config.mlp_hidden_act if family.hybrid else config.hidden_act
    other = {
        f"the parameter {min(odd, default='')}, which differs from other {config.model_type} models": bool(odd),
        f"{'mlp_' if family.hybrid else ''}hidden_act = {activation}": activation != family.activation,
        f"mamba_hidden_act = {getattr(config, 'mamba_hidden_act', None)}": family.hybrid
        and config.mamba_hidden_act != "silu",
        "tied embeddings": family.hybrid and config.tie_word_embeddings,
        f"attention_dropout = {config.attention_dropout:g}": config.attention_dropout > 0,
        "RoPE scaling that depends on the length or scales attention": not family.hybrid
        and _has_unusual_rope(body(causal)),
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
    if family.hybrid and dims.cp > 1:
        raise LimbeckError(
            f"{section}.strategy_config.context_parallel_size = {dims.cp}: {name} has recurrent layers (Mamba), which need "
            "whole rows; remove the key."
        )
    heads = Heads.of(config)
    divided = {"key and value heads": heads.groups, "feed-forward columns": config.intermediate_size}
    if heads.mamba is not None:
        divided |= {"heads of Mamba layers": heads.mamba.heads, "groups of Mamba layers": heads.mamba.groups}
    for what, size in divided.items():
        if size % dims.tp:
            raise LimbeckError(
                f"{section}.strategy_config.tensor_model_parallel_size = {dims.tp} does not divide the {size} {what} of "
                f"{name}; use a divisor, or fsdp2_train and fsdp2_infer."
            )


def _has_unusual_rope(trunk: Any) -> bool:
    rotary = trunk.rotary_emb
    return rotary.rope_type not in ("default", "linear", "llama3") or rotary.attention_scaling != 1
