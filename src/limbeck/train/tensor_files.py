"""Named tensors in safetensors files, of which each may contain boxes of larger tensors.

A file is a valid safetensors file. Where a tensor in it is not whole, the metadata entry ``shards`` has its name, the shape of
the whole tensor and the offsets of the box. Any number of such files together are one state.

Writing is our own because safetensors' function copies all tensors first, in some versions blocks Python while it writes,
and has no way to hash what passes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.strategies.shards import Box, Shard, whole_box

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLOCK = 1 << 24  # bytes; hashing and writing such a block releases the interpreter for other threads
_SHARDS = "shards"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write CPU tensors to a safetensors file and flush it to disk, with the extra memory of one tensor.

    Args:
        path: the file.
        tensors: by name.
        metadata: of the header.
        dtype: precision of the floating-point tensors in the file; by default their own.

    Returns:
        The fingerprint of the file, see ``fingerprint``.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        stored = stored_dtype(tensor, dtype)
        start, end = end, end + tensor.numel() * stored.itemsize
        header[name] = {"dtype": _DTYPES[stored], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in _blocks(len(text).to_bytes(8, "little") + text, tensors.values(), dtype):
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The precision in which ``write_tensors`` writes ``tensor``."""
    return tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype


def _blocks(header: bytes, tensors: Iterable[Tensor], dtype: torch.dtype | None) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        if tensor.numel():
            stored = tensor.to(stored_dtype(tensor, dtype)).contiguous()
            data = memoryview(cast(Any, stored.flatten().view(torch.uint8).numpy()))
            yield from (data[i : i + _BLOCK] for i in range(0, len(data), _BLOCK))


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def write_shards(path: Path, shards: Mapping[str, Sequence[Shard]]) -> dict[str, Any]:
    """Write boxes of tensors, on the CPU, to a safetensors file. Returns its fingerprint."""
    tensors, boxes = {}, {}
    for name, parts in shards.items():
        for i, part in enumerate(parts):
            key = f"{name}#{i}" if i else name
            tensors[key] = part.read()
            if part.box != whole_box(part.shape):
                boxes[key] = {"name": name, "shape": part.shape, "offsets": part.offsets}
    return write_tensors(path, tensors, {_SHARDS: json.dumps(boxes)} if boxes else {})


class StoredTensor:
    """A whole tensor whose boxes are in files; a read touches only the bytes that it needs.

    shape: of the whole tensor. boxes: the open file, the key in it, and the box of the whole, of each part.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape
        self.boxes: list[tuple[Any, str, Box]] = []

    def __getitem__(self, box: Box) -> Tensor:
        """The values of a box. Raises LimbeckError if the files do not have all of them."""
        parts = [(file, key, held, _overlap(held, box)) for file, key, held in self.boxes]
        parts = [part for part in parts if _size(part[-1])]
        if sum(_size(common) for *_, common in parts) != _size(box):
            raise LimbeckError(f"the checkpoint does not have all of {self.name}; resume from another one.")
        if len(parts) == 1:
            file, key, held, common = parts[0]
            return _read(file, key, _relative(common, held))
        out = None
        for file, key, held, common in parts:
            values = _read(file, key, _relative(common, held))
            if out is None:
                out = values.new_empty([part.stop - part.start for part in box])
            out[_relative(common, box)] = values
        assert out is not None or not _size(box)
        return torch.empty([part.stop - part.start for part in box]) if out is None else out


def open_shards(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors that are in ``files``, by name; only the headers are read."""
    found: dict[str, StoredTensor] = {}
    for path in files:
        file = safe_open(path, framework="pt")
        boxes = json.loads((file.metadata() or {}).get(_SHARDS, "{}"))
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            sizes = tuple(file.get_slice(key).get_shape())
            part = boxes.get(key, {"name": key, "shape": sizes, "offsets": [0] * len(sizes)})
            tensor = found.setdefault(part["name"], StoredTensor(part["name"], tuple(part["shape"])))
            box = tuple(slice(low, low + size) for low, size in zip(part["offsets"], sizes, strict=True))
            tensor.boxes.append((file, key, box))
    return found


def _read(file: Any, key: str, box: Box) -> Tensor:
    values: Tensor = file.get_slice(key)[box] if box else file.get_tensor(key)
    return values


def _overlap(one: Box, other: Box) -> Box:
    return tuple(
        slice(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))
        for a, b in zip(one, other, strict=True)
    )


def _relative(box: Box, whole: Box) -> Box:
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, whole, strict=True))


def _size(box: Box) -> int:
    return prod(part.stop - part.start for part in box)
