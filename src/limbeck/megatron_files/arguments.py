"""Megatron-LM's arguments as its checkpoints store them, in either format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.folders import MEGATRON_INDEX, megatron_iteration
from limbeck.megatron_files.inert import Record, read_metadata, read_torch_file

COMMON = "common.pt"
"""The file of a ``torch_dist`` checkpoint with the arguments, before megatron-core 0.19."""

LEGACY = "model_optim_rng.pt"
"""The file of each rank of a ``torch`` checkpoint."""

_COMMON_PART = "common_state/shard_0_1"  # of the files of tensors, in place of COMMON since megatron-core 0.19


def stored_arguments(name: str) -> dict[str, Any]:
    """The arguments in the checkpoint ``name``: a folder of checkpoints, of which the newest is read, or of one iteration.

    Returns:
        The arguments by name; empty if there are none.

    Raises:
        LimbeckError: if there is no checkpoint, or it is damaged.
    """
    folder = megatron_iteration(Path(name))
    if (folder / MEGATRON_INDEX).is_file():
        return dist_arguments(folder, read_metadata(folder / MEGATRON_INDEX))
    file = next(iter(sorted(folder.glob(f"mp_rank_*/{LEGACY}"))), None)
    if file is None:
        raise LimbeckError(f"{folder} has no mp_rank_*/{LEGACY}; copy the checkpoint again.")
    return legacy_arguments(file)


def dist_arguments(folder: Path, index: Any) -> dict[str, Any]:
    """Those of a ``torch_dist`` checkpoint. index: what ``read_metadata`` returns for it."""
    if (folder / COMMON).is_file():
        return _arguments(read_torch_file(folder / COMMON))
    for key, info in getattr(index, "storage_data", {}).items():
        if key.fqn == _COMMON_PART:
            return _arguments(read_torch_file(folder / info.relative_path, (info.offset, info.length))[0])
    return {}


def legacy_arguments(file: Path) -> dict[str, Any]:
    """Those in the ``file`` of one rank of a ``torch`` checkpoint."""
    return _arguments(read_torch_file(file))


def _arguments(content: Any) -> dict[str, Any]:
    stored = content.get("args") if isinstance(content, dict) else None
    return dict(vars(stored)) if isinstance(stored, Record) else {}
