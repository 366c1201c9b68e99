"""Writes the weights of a Hugging Face model in Megatron's format ``torch``, as the file of a single rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.megatron_files.arguments import LEGACY
from limbeck.models.megatron_checkpoint.state import extra_states, parameters_of
from limbeck.models.megatron_checkpoint.stored import EXPERTS
from limbeck.models.megatron_families import family_of


def write_legacy(model: Any, folder: Path, common: dict[str, Any], rows: int, *, fused: bool) -> None:
    """Write the only file.

    Args:
        model: a Hugging Face model.
        folder: an existing one, of the iteration.
        common: what the file has beside the model.
        rows: of embeddings and output head.
        fused: names of Transformer Engine's layers, not of Megatron's local ones, which a hybrid does not have.
    """
    fused = fused or family_of(model).hybrid
    state: dict[str, Tensor | None] = {}
    for one in parameters_of(model, rows):
        name, tensor = (one.fused if fused else one.name).replace("*", str(one.layer)), one.make()
        if one.name not in EXPERTS:
            state[name] = tensor
            continue
        each = EXPERTS[one.name].replace("*", str(one.layer)).replace("experts.experts", "experts.local_experts.{}")
        state |= {each.format(number): matrix.clone() for number, matrix in enumerate(tensor)}
    if fused:
        state |= dict.fromkeys(extra for name in [*state] for extra in extra_states(name))
    path = folder / "mp_rank_00" / LEGACY
    path.parent.mkdir()
    torch.save({**common, "model": state}, path)
