"""A checkpoint of Megatron-LM as it lies on disk, in either format: its arguments, and its parameters by name and layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from limbeck.models.megatron_families import local_name

Key = tuple[str, int | None]
"""Name of a parameter, with ``*`` for the number of the layer, and that number in the whole model."""

_PARTS = ("embedding.", "decoder.", "output_layer.", "encoder.", "mtp.")
_LAYER = re.compile(r"(?<=\.layers\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class StoredCheckpoint:
    """where: its folder, for error messages. arguments: of Megatron-LM; empty if it holds none.

    parameters: functions that read the slices of one parameter, one for each tensor-parallel rank.
    """

    where: str
    arguments: dict[str, Any]
    parameters: dict[Key, Callable[[], list[Tensor]]]


def parameter_key(name: str) -> Key | None:
    """The key of a parameter of the model under its name in a file; None for what is no parameter, or not the model's."""
    while name.startswith(("model.", "module.")):
        name = name.partition(".")[2]
    if not name.startswith(_PARTS) or "._extra_state" in name:
        return None
    name = local_name(name)
    found = _LAYER.search(name)
    return _LAYER.sub("*", name, count=1), int(found[0]) if found else None
