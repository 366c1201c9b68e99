"""The parameters of a Hugging Face model as Megatron-LM's model of it has them, whole and made one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from limbeck.models.megatron_checkpoint.stored import FUSED, HYBRID_NORM, PRE_MLP_NORM
from limbeck.models.megatron_families import HEAD, Heads, Kind, Parameter, family_of, layers_with_experts, slice_of

_WITH_EXTRA_STATE = (
    *("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm", "linear_fc1", "linear_fc2", "in_proj", "out_proj"),
    *("pre_mlp_layernorm", "final_layernorm", "final_norm", "output_layer"),
)


@dataclass(frozen=True)
class MadeParameter:
    """A parameter of Megatron's model, whose ``make`` builds the tensor.

    name: of Megatron's local layers, with ``*`` for the number of the layer. fused: of Transformer Engine's. layer: None
    outside of layers.
    """

    name: str
    fused: str
    layer: int | None
    kind: Kind
    make: Callable[[], Tensor]


def parameters_of(model: Any, rows: int) -> Iterator[MadeParameter]:
    """The parameters of ``model``, with ``rows`` of embeddings and output head; the latter is left out if it is tied."""
    tensors, heads, family = dict(model.named_parameters()), Heads.of(model.config), family_of(model)
    experts = layers_with_experts(model)
    for one in family.parameters(model):
        if one.sources == (HEAD,) and model.config.tie_word_embeddings:
            continue
        name = HYBRID_NORM.get(one.name, one.name) if family.hybrid else one.name
        # The router comes between this norm and the experts.
        separate = name == PRE_MLP_NORM and one.layer is not None and experts[one.layer]
        fused = name if separate else FUSED.get(name, name)
        yield MadeParameter(name, fused, one.layer, one.kind, partial(_make, one, tensors, heads, rows))


def _make(parameter: Parameter, tensors: dict[str, Tensor], heads: Heads, rows: int) -> Tensor:
    sources = [tensors[source].detach() for source in parameter.sources]
    made = slice_of(parameter.kind, sources, heads, 0, 1)
    return pad(made, (0, 0, 0, rows - len(made))) if parameter.kind == "vocabulary" else made.contiguous()


def extra_states(name: str) -> list[str]:
    """Names of the extra states that a module with the parameter ``name`` may require, which are None without FP8."""
    module, _, kind = name.rpartition(".")
    if kind != "weight" or module.rpartition(".")[2] not in _WITH_EXTRA_STATE:
        return []
    attention = [module.replace("linear_proj", "core_attention")] if module.endswith("linear_proj") else []
    return [f"{one}._extra_state" for one in (module, *attention)]
