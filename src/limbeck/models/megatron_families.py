"""How the parameters of Megatron's GPTModel are made of those of a Hugging Face model, one small table per family.

Megatron joins queries, keys and values in one matrix, group of heads by group of heads, and the gate and up projections
in another, gate first on each rank. It slices matrices over tensor-parallel ranks and pads the vocabulary to a multiple
of their number. Optimizer moments have the shapes of their parameters and are converted alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.models.heads import body, decoder_layers, unwrap_model

Kind = Literal[
    "vocabulary", "copy", "qkv", "gate_up", "row", "column", "experts_gate_up", "experts_down", "mamba_in", "mamba_conv"
]

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "mixer.in_proj.layer_norm_": "norm.",
}
"""Names in Transformer Engine's layers, where a norm and the matrix after it are one module, to those in local layers."""

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
class Parameter:
    """A parameter of one layer. name: has ``*`` for the number of the layer. layer: None outside of layers.

    kind, sources: see ``Rule``; the sources have the layer's number.
    """

    name: str
    layer: int | None
    kind: Kind
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """An architecture. rules: parameter of Megatron's to how it is made. qkv_bias, qk_norm: what Megatron must build.

    activation: of feed-forward layers, which have a gate unless it is ``relu2``. hybrid: each layer is either a Mamba layer,
    attention or a feed-forward layer, by the configuration's ``layer_types``, and there are no position embeddings.
    settings: of Megatron's TransformerConfig, instead of those that follow from the rest.
    """

    rules: dict[str, Rule]
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    hybrid: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self, model: Any) -> Iterator[Parameter]:
        """All parameters of Megatron's model that is the Hugging Face ``model``, each name with all its layers in order."""
        experts = layers_with_experts(model)
        kinds = getattr(unwrap_model(model).config, "layer_types", None) or [None] * len(experts)
        for name, rule in self.rules.items():
            if "*" not in name:
                yield Parameter(name, None, rule.kind, rule.sources)
                continue
            for layer, (kind, has_experts) in enumerate(zip(kinds, experts, strict=True)):
                if rule.layers in (None, kind) and _is_in(name, has_experts=has_experts):
                    sources = tuple(source.replace("*", str(layer)) for source in rule.sources)
                    yield Parameter(name, layer, rule.kind, sources)


def _is_in(name: str, *, has_experts: bool) -> bool:
    """Whether a layer, which has experts or none, has the parameter ``name`` of Megatron's."""
    part = name.partition(".mlp.")[2]
    return not part or part.startswith("linear_fc") != has_experts


_LAYER, _ATTENTION, _MLP = "model.layers.*.", "model.layers.*.self_attn.", "model.layers.*.mlp."
_OURS = "decoder.layers.*."

_DENSE = {
    f"{_OURS}mlp.linear_fc1.weight": Rule("gate_up", (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight")),
    f"{_OURS}mlp.linear_fc2.weight": Rule("row", (f"{_MLP}down_proj.weight",)),
}
_EXPERTS = {
    f"{_OURS}mlp.experts.gate_up_proj": Rule("experts_gate_up", (f"{_MLP}experts.gate_up_proj",)),
    f"{_OURS}mlp.experts.down_proj": Rule("experts_down", (f"{_MLP}experts.down_proj",)),
    f"{_OURS}mlp.router.weight": Rule("copy", (f"{_MLP}gate.weight",)),
}
_LLAMA: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Rule("vocabulary", (EMBEDDINGS,)),
    f"{_OURS}input_layernorm.weight": Rule("copy", (f"{_LAYER}input_layernorm.weight",)),
    f"{_OURS}self_attention.linear_qkv.weight": Rule("qkv", tuple(f"{_ATTENTION}{x}_proj.weight" for x in "qkv")),
    f"{_OURS}self_attention.linear_proj.weight": Rule("row", (f"{_ATTENTION}o_proj.weight",)),
    f"{_OURS}pre_mlp_layernorm.weight": Rule("copy", (f"{_LAYER}post_attention_layernorm.weight",)),
    **_DENSE,
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

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA),
    "mistral": Family(_LLAMA),
    "qwen2": Family(_LLAMA | _QKV_BIAS, qkv_bias=True),
    "qwen3": Family(_LLAMA | _QK_NORM, qk_norm=True),
    "mixtral": Family(_LLAMA | _EXPERTS),
    "qwen3_moe": Family(_LLAMA | _QK_NORM | _EXPERTS, qk_norm=True),
    "nemotron_h": Family(_NEMOTRON_H, activation="relu2", hybrid=True),
}
"""``model_type`` of a Hugging Face configuration to its family."""


def is_hybrid(config: Any) -> bool:
    """Whether a Hugging Face configuration is of a hybrid."""
    return config.model_type in FAMILIES and FAMILIES[config.model_type].hybrid


def rules_of_experts() -> dict[str, Rule]:
    """How experts and routers are made of the tensors that Transformers' models with experts have."""
    return dict(_EXPERTS)


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
        mamba = MambaSizes.of(config) if is_hybrid(config) else None
        return cls(heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads, mamba)


@dataclass(frozen=True)
class ExpertShape:
    """Experts of one layer of a mixture of experts.

    count: of a layer. active: for each token. width: feed-forward columns of one expert. normalized: the weights of a
    token's experts sum to 1.
    """

    count: int
    active: int
    width: int
    normalized: bool

    @classmethod
    def of(cls, config: Any) -> ExpertShape | None:
        """Those of a Hugging Face configuration; None for a dense model. The layers of hybrids have none."""
        if is_hybrid(config):
            return None
        count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        if not count:
            return None
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        return cls(count, config.num_experts_per_tok, width, getattr(config, "norm_topk_prob", True))


def local_name(name: str) -> str:
    """The name that ``Family.rules`` have for a parameter of Megatron's, also of Transformer Engine's layers."""
    for fused, separate in FUSED_NORMS.items():
        name = name.replace(fused, separate)
    return name.replace("mixer.conv1d_", "mixer.conv1d.")  # of the Mamba layers of Megatron 0.19


def layers_with_experts(model: Any) -> list[bool]:
    """For each layer of a Hugging Face model whether it has experts."""
    return [hasattr(getattr(layer, "mlp", None), "experts") for layer in decoder_layers(body(unwrap_model(model)))]


def padded_rows(vocab_size: int, ranks: int) -> int:
    """Rows of embeddings and head in Megatron, the same number on each of ``ranks``."""
    return -(-vocab_size // ranks) * ranks


def slice_of(kind: Kind, tensors: Sequence[Tensor], heads: Heads, rank: int, ranks: int) -> Tensor:
    """The part of tensor-parallel ``rank`` of ``ranks`` of the parameter that is made of whole ``tensors``.

    Of experts: of this rank's experts, [experts, rows, columns].
    """
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
    if kind == "experts_gate_up":
        return torch.cat([x.chunk(ranks, 1)[rank] for x in tensors[0].chunk(2, 1)], 1)
    if kind == "experts_down":
        return tensors[0].chunk(ranks, 2)[rank]
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
    if kind == "experts_gate_up":
        return [torch.cat([part for x in zip(*(x.chunk(2, 1) for x in slices), strict=True) for part in x], 1)]
    if kind == "experts_down":
        return [torch.cat(list(slices), 2)]
    groups = torch.cat(list(slices)).unflatten(0, (heads.groups, -1))
    sizes = [heads.heads // heads.groups * heads.dim, heads.dim, heads.dim]
    return [x.flatten(0, 1) for x in groups.split(sizes, 1)]


def family_of(model: Any) -> Family:
    """The family of a Hugging Face model with a table."""
    return FAMILIES[unwrap_model(model).config.model_type]
