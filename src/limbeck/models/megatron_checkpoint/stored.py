"""A checkpoint of Megatron-LM as it lies on disk, in either format: its arguments, and its parameters by name and layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from limbeck.models.megatron_families import local_name

Key = tuple[str, int | None]
"""Name of a parameter in ``megatron_families``, with ``*`` for the number of the layer, and that number in the whole model."""

LAYERS = "decoder.layers."

_PARTS = ("embedding.", "decoder.", "output_layer.", "encoder.", "mtp.")
_LAYER = re.compile(r"(?<=\.layers\.)(\d+)(?=\.)")

PRE_MLP_NORM = f"{LAYERS}*.pre_mlp_layernorm.weight"

FUSED = {
    local_name(name): name
    for name in (
        f"{LAYERS}*.self_attention.linear_qkv.layer_norm_weight",
        f"{LAYERS}*.mlp.linear_fc1.layer_norm_weight",
        f"{LAYERS}*.mixer.in_proj.layer_norm_weight",
    )
}
"""Norms that Transformer Engine computes in one module with the matrix after it. Local layers have the first names."""

HYBRID_NORM = {"decoder.final_layernorm.weight": "decoder.final_norm.weight"}
"""The last norm of a MambaModel."""

EXPERTS = {
    f"{LAYERS}*.mlp.experts.gate_up_proj": f"{LAYERS}*.mlp.experts.experts.linear_fc1.weight",
    f"{LAYERS}*.mlp.experts.down_proj": f"{LAYERS}*.mlp.experts.experts.linear_fc2.weight",
}
"""The matrices of all experts of a layer, in the format ``torch_dist``."""

_NAMES = {there: here for names in (HYBRID_NORM, EXPERTS) for here, there in names.items()}


@dataclass(frozen=True)
class StoredCheckpoint:
    """where: its folder, for error messages. arguments: of Megatron-LM; empty if it holds none.

    parameters: functions that read the slices of one parameter, one for each tensor-parallel rank. The slices of experts are
    those of all experts, [experts, rows, columns].
    """

    where: str
    arguments: dict[str, Any]
    parameters: dict[Key, Callable[[], list[Tensor]]]

    @property
    def has_mamba(self) -> bool:
        """Whether it is of a MambaModel, which the arguments of one without attention layers do not show."""
        return any(".mixer." in name for name, _ in self.parameters)


def parameter_key(name: str) -> Key | None:
    """The key of a parameter of the model under its name in a file; None for what is no parameter, or not the model's.

    A name of equal layers along a first axis has a ``*`` in its key, and None for the layer.
    """
    while name.startswith(("model.", "module.")):
        name = name.partition(".")[2]
    if not name.startswith(_PARTS) or "._extra_state" in name:
        return None
    name = local_name(name)
    found = _LAYER.search(name)
    name = _LAYER.sub("*", name, count=1) if found else name.replace(LAYERS, f"{LAYERS}*.", 1)
    return _NAMES.get(name, name), int(found[0]) if found else None


def path_of(name: str, layer: int | None) -> str:
    """What to call a parameter in a sentence."""
    return EXPERTS.get(name, name).replace("*", str(layer))
