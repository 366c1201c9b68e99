"""Megatron's format ``torch_dist``: files of torch.distributed.checkpoint, with equal layers stacked along a first axis."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.folders import MEGATRON_INDEX
from limbeck.megatron_files.arguments import dist_arguments
from limbeck.megatron_files.inert import read_metadata, reason
from limbeck.models.megatron_checkpoint.stored import Key, StoredCheckpoint, parameter_key
from limbeck.models.megatron_families import Kind, local_name

_IN_PROJ = ("z", "x", "B", "C", "dt")
PARTS: dict[Kind, tuple[str, ...]] = {"mamba_in": _IN_PROJ, "mamba_conv": _IN_PROJ[1:4]}
"""The parts into which Megatron divides some parameters of a Mamba layer, each a tensor of its own."""

_PART = re.compile(rf"(.*\.mixer\.(?:in_proj|conv1d)\.(?:weight|bias))\.({'|'.join(_IN_PROJ)})")


def open_torch_dist(folder: Path) -> StoredCheckpoint:
    """The checkpoint in ``folder``, of any layout.

    Raises:
        LimbeckError: if it is incomplete or damaged.
    """
    index = read_metadata(folder / MEGATRON_INDEX)
    try:
        places = {
            (key.fqn, getattr(key, "offset", None)): (info.relative_path, info.offset, info.length)
            for key, info in index.storage_data.items()
            if not getattr(info, "transform_descriptors", None)
        }
        tensors = {
            name: _Tensor(folder, tuple(entry.size), entry.properties.state[0], _chunks(name, entry, places))
            for name, entry in index.state_dict_metadata.items()
            if hasattr(entry, "chunks") and parameter_key(name) is not None
        }
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise LimbeckError(
            f"{folder / MEGATRON_INDEX} does not list the parts of its tensors ({error}); copy the checkpoint again."
        ) from error
    parameters: dict[Key, Callable[[], list[Tensor]]] = {}
    parts: dict[Key, dict[str, _Tensor]] = {}
    for name, tensor in tensors.items():
        part = _PART.fullmatch(local_name(name))
        key = parameter_key(part[1] if part else name)
        assert key is not None
        if part:
            parts.setdefault(key, {})[part[2]] = tensor
        elif "*" in key[0] and key[1] is None:
            parameters |= {(key[0], layer): partial(tensor.read, layer) for layer in range(tensor.shape[0])}
        else:
            parameters[key] = tensor.read
    parameters |= {key: partial(_join, found) for key, found in parts.items()}
    return StoredCheckpoint(str(folder), dist_arguments(folder, index), parameters)


def _join(parts: dict[str, _Tensor]) -> list[Tensor]:
    """A whole parameter of a Mamba layer. A missing part shows in its shape."""
    return [torch.cat([parts[part].read()[0] for part in _IN_PROJ if part in parts])]


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor: where it begins in it, its shape, its file, and its bytes there."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


def _chunks(name: str, entry: Any, places: dict[Any, Any]) -> list[_Chunk]:
    return [_Chunk(tuple(one.offsets), tuple(one.sizes), *places[name, one.offsets]) for one in entry.chunks]


@dataclass(frozen=True)
class _Tensor:
    folder: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[_Chunk]

    def read(self, layer: int | None = None) -> list[Tensor]:
        """The whole tensor, or one entry of its first axis, as the slice of a single rank."""
        begin, end = (0, self.shape[0]) if layer is None else (layer, layer + 1)
        whole, filled = torch.empty(end - begin, *self.shape[1:], dtype=self.dtype), 0
        for chunk in self.chunks:
            first, last = max(begin, chunk.offsets[0]), min(end, chunk.offsets[0] + chunk.shape[0])
            if first >= last:
                continue
            part = self._read(chunk)[first - chunk.offsets[0] : last - chunk.offsets[0]]
            rest = (slice(at, at + size) for at, size in zip(chunk.offsets[1:], chunk.shape[1:], strict=True))
            place = (slice(first - begin, last - begin), *rest)
            whole[place] = part
            filled += part.numel()
        if filled != whole.numel():
            raise LimbeckError(f"{self.folder} has only {filled} of {whole.numel()} values of a tensor; copy it again.")
        return [whole if layer is None else whole[0]]

    def _read(self, chunk: _Chunk) -> Tensor:
        path = self.folder / Path(chunk.file).name  # never outside the folder
        try:
            with path.open("rb") as file:
                file.seek(chunk.start)
                part = torch.load(io.BytesIO(file.read(chunk.length)), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise LimbeckError(f"{path} is missing or damaged ({reason(error)}); copy the checkpoint again.") from error
        if not isinstance(part, Tensor) or tuple(part.shape) != chunk.shape:
            raise LimbeckError(f"{path} does not hold what {MEGATRON_INDEX} lists; copy the checkpoint again.")
        return part
