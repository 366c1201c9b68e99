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

from limbeck.models.heads import unwrap_model

Kind = Literal["vocabulary", "copy", "qkv", "gate_up", "row"]

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One parameter of Megatron's: ``kind`` is how it is divided, ``sources`` are the Hugging Face tensors in it.

    ``*`` is the number of the layer.
    """

    kind: Kind
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """An architecture. rules: parameter of Megatron's to how it is made. qkv_bias, qk_norm: what Megatron must build."""

    rules: dict[str, Rule]
    qkv_bias: bool = False
    qk_norm: bool = False


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

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA),
    "mistral": Family(_LLAMA),
    "qwen2": Family(_LLAMA | _QKV_BIAS, qkv_bias=True),
    "qwen3": Family(_LLAMA | _QK_NORM, qk_norm=True),
}
"""``model_type`` of a Hugging Face configuration to its family."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of a whole model. groups: of key and value heads. dim: of one head."""

    heads: int
    groups: int
    dim: int

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Those of a Hugging Face configuration."""
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        return cls(heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads)


def padded_rows(vocab_size: int, ranks: int) -> int:
    """Rows of embeddings and head in Megatron, the same number on each of ``ranks``."""
    return -(-vocab_size // ranks) * ranks


def slice_of(kind: Kind, tensors: Sequence[Tensor], heads: Heads, rank: int, ranks: int) -> Tensor:
    """The part of tensor-parallel ``rank`` of ``ranks`` of the parameter that is made of whole ``tensors``."""
    if kind == "copy":
        return tensors[0]
    if kind == "row":
        return tensors[0].chunk(ranks, 1)[rank]
    if kind == "vocabulary":
        (table,) = tensors
        missing = padded_rows(len(table), ranks) - len(table)
        return torch.nn.functional.pad(table, (0, 0, 0, missing)).chunk(ranks)[rank]
    if kind == "gate_up":
        return torch.cat([x.chunk(ranks)[rank] for x in tensors])
    groups = [x.unflatten(0, (heads.groups, -1)) for x in tensors]  # per group: its queries, its key, its value
    return torch.cat(groups, 1).flatten(0, 1).chunk(ranks)[rank]


def joined(kind: Kind, slices: Sequence[Tensor], heads: Heads, vocab_size: int) -> list[Tensor]:
    """The inverse of ``slice_of``: whole tensors from the parts of all ranks."""
    if kind == "copy":
        return [slices[0]]
    if kind == "row":
        return [torch.cat(list(slices), 1)]
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
