"""Megatron's format ``torch``: one file for each rank of tensor and pipeline parallelism, each with its own layer numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.models.megatron_checkpoint.inert import Record, read_torch_file
from limbeck.models.megatron_checkpoint.stored import Key, StoredCheckpoint, parameter_key

FILE = "model_optim_rng.pt"

_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")


def open_legacy(folder: Path) -> StoredCheckpoint:
    """The checkpoint in ``folder``, whose files are merged.

    Raises:
        LimbeckError: if files are missing or damaged, or can only be unpickled.
    """
    files = _files(folder)
    states = {rank: read_torch_file(path) for rank, path in files.items()}
    arguments = states[0, 0].get("args")
    known = dict(vars(arguments)) if isinstance(arguments, Record) else {}
    tensor, pipeline = (max(rank[axis] for rank in files) + 1 for axis in (0, 1))
    tensor, pipeline = (
        max(found, known.get(name) or 1)
        for found, name in ((tensor, "tensor_model_parallel_size"), (pipeline, "pipeline_model_parallel_size"))
    )
    for rank in ((t, p) for t in range(tensor) for p in range(pipeline)):
        if rank not in files:
            raise LimbeckError(
                f"{folder} has no file of tensor-parallel rank {rank[0]} and pipeline rank {rank[1]}, but the checkpoint was "
                f"saved by {tensor} x {pipeline} of them; copy it again."
            )
    chunks = [name for name in ("model", *(f"model{i}" for i in range(1000))) if name in states[0, 0]]
    parameters: dict[Key, list[Tensor]] = {}
    offset = 0
    for chunk in chunks:  # virtual stage by virtual stage, each over all pipeline ranks, is the order of the layers
        for stage in range(pipeline):
            layers = 0
            for part in range(tensor):
                for key, value in _parameters(states[part, stage].get(chunk), files[part, stage]).items():
                    layers = max(layers, 0 if key[1] is None else key[1] + 1)
                    moved = key[0], None if key[1] is None else key[1] + offset
                    parameters.setdefault(moved, []).append(value)
            offset += layers
    read: dict[Key, Callable[[], list[Tensor]]] = {
        key: partial(_first, slices, tensor) for key, slices in parameters.items()
    }
    return StoredCheckpoint(str(folder), known, read)


def _first(slices: list[Tensor], ranks: int) -> list[Tensor]:
    """Of a parameter that several pipeline stages hold, the copy of the first."""
    return slices[:ranks]


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in sorted(folder.glob("mp_rank_*")):
        rank = _RANK.fullmatch(path.name)
        if rank is None:
            raise LimbeckError(
                f"{path} is of a layout with expert parallelism, or of a Megatron that is too old, which is not read; load it "
                "with Megatron-LM and save it with --ckpt-format torch_dist."
            )
        if not (path / FILE).is_file():
            raise LimbeckError(f"{path} has no {FILE}; copy the checkpoint again.")
        found[int(rank[1]), int(rank[2] or 0)] = path / FILE
    if (0, 0) not in found:
        raise LimbeckError(f"{folder} has no file of the first rank, mp_rank_00; copy the checkpoint again.")
    return found


def _parameters(state: Any, path: Path) -> dict[Key, Tensor]:
    if not isinstance(state, Mapping) or "language_model" in state:
        raise LimbeckError(
            f"{path} holds no model of megatron-core; convert it with Megatron-LM's tools/checkpoint/convert.py first."
        )
    found = {parameter_key(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return {key: value for key, value in found.items() if key is not None}
