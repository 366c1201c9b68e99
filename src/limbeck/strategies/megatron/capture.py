"""Captures outputs of Megatron's submodules under the names of their Hugging Face counterparts.

Only submodules whose output is whole in its width on every tensor-parallel rank have one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limbeck.config.schema import MegatronConfig
from limbeck.errors import LimbeckError
from limbeck.models import HiddenStateCapture
from limbeck.strategies.megatron.body import MegatronBody

_IN_LAYER = {
    "": "",
    "input_layernorm": "input_layernorm",
    "self_attn": "self_attention",
    "self_attn.o_proj": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp": "mlp",
    "mlp.down_proj": "mlp.linear_fc2",
}
"""Name within a Hugging Face layer to that within Megatron's."""

_FUSED = ("input_layernorm", "post_attention_layernorm", "norm")  # with Transformer Engine, in layers without experts

_IN_HYBRID_LAYER = {
    "linear_attention": {"": "", "norm": "norm", "mixer": "mixer"},
    "full_attention": {
        "": "",
        "norm": "input_layernorm",
        "mixer": "self_attention",
        "mixer.o_proj": "self_attention.linear_proj",
    },
    "mlp": {"": "", "norm": "pre_mlp_layernorm", "mixer": "mlp", "mixer.down_proj": "mlp.linear_fc2"},
}
"""The same for each kind of layer of a hybrid."""

_EMBEDDINGS, _NORM = ("model.embed_tokens", "model.embeddings"), ("model.norm", "model.norm_f")

_LAYER = re.compile(r"model\.layers\.(\d+)(?:\.(.+))?")


@dataclass(frozen=True)
class MegatronCapture(HiddenStateCapture):
    """Captures submodules of ``trunk``; those of other pipeline stages are None."""

    trunk: MegatronBody | None = None

    def kept(self, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.clone()  # Megatron then adds the residual in place

    def whole(self, output: Tensor, time: int) -> Tensor:
        assert self.trunk is not None
        self.trunk.groups.activate()
        return self.trunk.rows(output, time)

    def widths(self, trunk: nn.Module) -> list[int]:
        assert self.trunk is not None
        return [self.trunk.config.hidden_size] * len(self.names)


def capture_in(trunk: MegatronBody, role: str, names: Sequence[str]) -> HiddenStateCapture:
    """Captures the submodules of ``trunk`` that compute what the Hugging Face submodules ``names`` do.

    Raises:
        LimbeckError: for a submodule without a counterpart.
    """
    return MegatronCapture(tuple(names), tuple(_find(trunk, name, role) for name in names), role, trunk)


def recompute_layers(trunk: MegatronBody, given: MegatronConfig) -> None:
    """Full recomputation by PyTorch's checkpoints, one layer each. Megatron's own hide what is captured from autograd."""
    for number, layer in enumerate(trunk.gpt.decoder.layers):
        if given.recompute_method == "uniform" or number < given.recompute_num_layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _find(trunk: MegatronBody, name: str, role: str) -> nn.Module | None:
    gpt, found, inside = trunk.gpt, _LAYER.fullmatch(name), _IN_LAYER
    if gpt.config.transformer_impl == "transformer_engine" and found is not None and found[2] in _FUSED:
        raise LimbeckError(
            f"features.pairs: Transformer Engine computes the {role}'s {name} together with the matrix after it, and no output "
            f"is left to compare; set {role}.strategy_args.strategy_config.transformer_impl: local, or pair another submodule."
        )
    if found is not None and trunk.hybrid:
        inside = _IN_HYBRID_LAYER[trunk.config.layer_types[int(found[1])]]
    if found is not None and (found[2] or "") in inside:
        layers = {layer.layer_number - 1: layer for layer in gpt.decoder.layers}
        layer = layers.get(int(found[1]))
        return None if layer is None else layer.get_submodule(inside[found[2] or ""])
    if name in _EMBEDDINGS:
        return gpt.embedding if gpt.pre_process else None
    if name in _NORM:
        return gpt.decoder.final_layernorm if gpt.post_process else None
    first, last = (names[trunk.hybrid] for names in (_EMBEDDINGS, _NORM))
    raise LimbeckError(
        f"features.pairs: no submodule of megatron-core computes the {role}'s {name} on one rank; name a layer "
        f"(model.layers.0), or in it {', '.join(part for part in inside if part)}, or {first} or {last}, or use "
        "fsdp2_train and fsdp2_infer."
    )
