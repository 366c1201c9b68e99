"""Chunks of positions: their size, their buffers, and the matrix products with the output head.

Shapes: n positions of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from limbeck.objectives.divergences import LOWEST
from limbeck.objectives.kernels import ROUND

_CHUNK_BYTES = {"cpu": 124 << 20, "cuda": 1 << 30}
_WHOLE_ROWS, _WHOLE_BYTES = 1024, 256 << 20  # a small vocabulary takes 1024 rows at once: large products are faster
_TILE_ELEMENTS = 1 << 19  # with about eight float32 temporaries 16 MiB, about the cache of two cores
_TEMPORARIES = 8  # float32 temporaries of a tile on a GPU: 5 to 13 at a time, half of that compiled
_COMPILED_TILE_BYTES = 5 << 20  # of logits; compiled code allocates two to four times as much on top
_EVEN_ROWS = 128  # rows of a tile of a GPU's matrix product; a partial tile takes the time of a whole one
_STRIP = 1024  # rows of the head in one product on a CPU


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


def row_width(vocab: int, device: torch.device) -> int:
    """The row stride of a buffer, in elements."""
    return vocab if device.type == "cpu" else -(-vocab // ROUND) * ROUND


def make_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized buffer [rows, vocab]. On a GPU its rows are aligned, as products and kernels read them fastest."""
    return torch.empty(rows, row_width(vocab, device), dtype=dtype, device=device)[:, :vocab]


def shared_bias(bias: Tensor | None, vocab: int, dtype: torch.dtype) -> Tensor | None:
    """The bias [V] of the shared vocabulary in ``dtype``, with −∞ replaced by a finite number."""
    return None if bias is None else bias[:vocab].to(dtype).clamp_min(LOWEST)


def head_product(h: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write h [n, H] · weightᵀ [H, V] to out [n, V].

    For few rows, the BLAS of a CPU is about 20 % faster on strips of the head that fit in its cache.
    """
    if h.device.type != "cpu" or h.dtype is not torch.float32:
        return torch.mm(h, weight.t(), out=out)
    for low in range(0, len(weight), _STRIP):
        torch.mm(h, weight[low : low + _STRIP].t(), out=out[:, low : low + _STRIP])
    return out


def add_product(d_weight: Tensor, dz: Tensor, h: Tensor) -> None:
    """d_weight [V, H] += dz [n, V]ᵀ h [n, H], in the precision of d_weight, without a second buffer of the head's size."""
    if dz.dtype == d_weight.dtype:
        d_weight.addmm_(dz.t(), h)
        return
    if _adds_wider(d_weight.device, dz.dtype, d_weight.dtype):
        torch.addmm(d_weight, dz.t(), h, out_dtype=d_weight.dtype, out=d_weight)
        return
    step = max(1, (1 << 22) // d_weight.shape[1])
    for low in range(0, d_weight.shape[0], step):
        d_weight[low : low + step] += torch.mm(dz[:, low : low + step].t(), h)


def rescale(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, computed in the dtype of scale."""
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


@cache
def _adds_wider(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether ``addmm`` of narrow matrices can add to a wide one in place, without rounding the product first."""
    if device.type != "cuda":
        return False
    total, ones = torch.ones(16, 16, dtype=wide, device=device), torch.ones(16, 16, dtype=narrow, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=wide, out=total)
    except (RuntimeError, TypeError):  # an older PyTorch, or a GPU without support
        return False
    return bool((total == 17).all())
