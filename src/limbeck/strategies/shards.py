"""The part of a tensor that one rank holds: a box of it, whichever way the tensor is divided.

Checkpoints are made of such boxes. They do not depend on how many ranks there are, so a rank of another layout reads the
parts of them that lie in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

from limbeck.strategies.parallel_dims import TP

Box = tuple[slice, ...]
"""A range of each dimension."""


class Sliceable(Protocol):
    """A whole tensor of which any box can be read: a ``Tensor``, or one in a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the whole tensor."""

    def __getitem__(self, box: Box) -> Tensor:
        """The values of a box."""


@dataclass(frozen=True)
class Shard:
    """A box of a tensor, held by this rank.

    shape: of the whole tensor. box: which part of it. read: gives the values, on any device; they may be the engine's own.
    """

    shape: tuple[int, ...]
    box: Box
    read: Callable[[], Tensor]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the box begins."""
        return tuple(part.start for part in self.box)

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(part.stop - part.start for part in self.box)


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor of this shape."""
    return tuple(slice(0, size) for size in shape)


def local_box(like: Tensor) -> Box:
    """Which part of a tensor this rank holds, placed as ``like`` is.

    PyTorch's own functions (2.13) do not divide unevenly over a dimension that FSDP and tensor parallelism share.
    """
    if not isinstance(like, DTensor):
        return whole_box(like.shape)
    box = list(whole_box(like.shape))
    mesh: Any = like.device_mesh
    names = mesh.mesh_dim_names or ()
    for i in sorted(range(mesh.ndim), key=lambda i: names[i] != TP):  # FSDP shards a tensor-parallel rank's slice
        placement: Any = like.placements[i]
        if not placement.is_replicate():
            start, stop = box[placement.dim].start, box[placement.dim].stop
            width = -(-(stop - start) // mesh.size(i))
            low = min(start + mesh.get_local_rank(i) * width, stop)
            box[placement.dim] = slice(low, min(low + width, stop))
    return tuple(box)


def shard_of(value: Any) -> Shard:
    """The part of ``value``, a DTensor or a whole tensor, that this rank holds."""
    local = (value.to_local() if isinstance(value, DTensor) else value).detach()
    return Shard(tuple(value.shape), local_box(value), lambda: local)


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes, in order, that together are the elements ``start`` to ``stop`` of a flattened tensor of this shape."""
    if len(shape) <= 1:
        if start < stop:
            yield (slice(start, stop),) if shape else ()
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows that are whole
    if first > last:  # within one row
        for box in flat_boxes(shape[1:], start % row, stop - last * row):
            yield (slice(last, last + 1), *box)
        return
    for box in flat_boxes(shape[1:], start - (first - 1) * row, row) if start < first * row else ():
        yield (slice(first - 1, first), *box)
    if first < last:
        yield (slice(first, last), *whole_box(shape[1:]))
    for box in flat_boxes(shape[1:], 0, stop - last * row):
        yield (slice(last, last + 1), *box)
