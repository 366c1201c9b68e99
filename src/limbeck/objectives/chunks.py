"""Chunks of positions: their size and precision, and the gradients that are summed over them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from limbeck.objectives import kernels
from limbeck.objectives.divergences import LOWEST

_CHUNK_BYTES = {"cpu": 124 << 20, "cuda": 1 << 30}
_WHOLE_ROWS, _WHOLE_BYTES = 1024, 256 << 20  # a small vocabulary takes 1024 rows at once: large products are faster
_TILE_ELEMENTS = 1 << 19  # with about eight float32 temporaries 16 MiB, about the cache of two cores
_TEMPORARIES = 8  # float32 temporaries of a tile on a GPU: 5 to 13 at a time, half of that compiled
_COMPILED_TILE_BYTES = 5 << 20  # of logits; compiled code allocates two to four times as much on top
_EVEN_ROWS = 128  # rows of a tile of a GPU's matrix product; a partial tile takes the time of a whole one


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of matrix products: that of autocast if it is enabled, else the wider of the two dtypes."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def default_chunk(device: torch.device, vocab: int, count: int, w_s: Tensor, w_t: Tensor | None) -> int:
    """How many of ``count`` positions form a chunk: as many as fit in the memory limit, in chunks of equal size."""
    per_row = vocab * (w_s.element_size() + (0 if w_t is None else w_t.element_size()))
    if device.type == "cpu" and _WHOLE_ROWS * per_row <= _WHOLE_BYTES:
        return _WHOLE_ROWS
    rows = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // per_row
    even = 8 if device.type == "cpu" or rows < _EVEN_ROWS else _EVEN_ROWS
    rows = max(16, rows // even * even)
    share = -(-count // max(1, -(-count // rows)))
    return -(-share // even) * even


def tile_rows(compiled: bool, z_s: Tensor, z_t: Tensor | None, device: torch.device) -> int:
    """How many rows of a chunk the elementwise pass processes at once, unless it is a GPU kernel.

    On a CPU its temporaries fit in the cache. On a GPU they take about as much memory as the chunk.
    """
    if device.type != "cpu":
        return -(-len(z_s) // _TEMPORARIES)
    if not compiled:
        return max(1, _TILE_ELEMENTS // z_s.shape[1])
    per_row = z_s.shape[1] * (z_s.element_size() + (0 if z_t is None else z_t.element_size()))
    return max(2, _COMPILED_TILE_BYTES // per_row // 2 * 2)  # an odd row would leave a core idle


def shared_bias(bias: Tensor | None, vocab: int, dtype: torch.dtype) -> Tensor | None:
    """The bias [V] of the shared vocabulary in ``dtype``, with −∞ replaced by a finite number."""
    return None if bias is None else bias[:vocab].to(dtype).clamp_min(LOWEST)


def rescale(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, computed in the dtype of scale."""
    if kernels.rescale(grad, scale):
        return
    if grad.dtype == scale.dtype:
        grad.mul_(scale)
        return
    for part in grad.split(max(1, (1 << 24) // max(1, grad[:1].numel()))):
        part.copy_(part.to(scale.dtype) * scale)


def narrowed(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a gradient to its parameter's dtype. A narrower one reuses the memory of ``grad``, which can be very large."""
    if dtype.itemsize >= grad.element_size():
        return grad.to(dtype)
    wide = grad.view(-1)
    narrow = wide.view(dtype)[: wide.numel()]
    for low in range(0, wide.numel(), 1 << 20):
        narrow[low : low + (1 << 20)] = wide[low : low + (1 << 20)].to(dtype)
    return narrow.view(grad.shape)


@cache
def keep_freed_tiles() -> None:
    """Make glibc reuse the memory of a tile's temporaries: fresh pages take as much time as the arithmetic.

    Freeing one block just below 32 MiB raises glibc's threshold for returning memory to the system (see mallopt(3)).
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
