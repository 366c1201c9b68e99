"""A chunk of positions and its share of a head: how large it is, the memory that it takes, and the products over it.

Shapes: n positions of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from limbeck.objectives.divergences import LOWEST
from limbeck.objectives.kernels import ROUND

_CHUNK_BYTES = {"cpu": 124 << 20, "cuda": 1 << 30}
_WHOLE_ROWS, _WHOLE_BYTES = 1024, 256 << 20  # a small vocabulary takes so many rows at once: products like them large
_TILE_ELEMENTS = 1 << 19  # with some eight float32 temporaries this is 16 MiB: about the cache of two cores
_TEMPORARIES = 8  # of a tile's size in float32, on a GPU: 5 to 13 that stand side by side, half of that compiled
_COMPILED_TILE_BYTES = 5 << 20  # of logits; compiled code adds two to four times as much
_EVEN_ROWS = 128  # a GPU's matrix product is cut into pieces of so many rows; fewer in the last are waste
_STRIP = 1024  # rows of a head that a CPU multiplies at once


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of products: autocast's where it is on, else the wider of the two."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def default_chunk(device: torch.device, vocab: int, count: int, w_s: Tensor, w_t: Tensor | None) -> int:
    """Positions whose logits are held at once, of ``count``: as many as the memory allowed for them takes, in even shares."""
    per_row = vocab * (w_s.element_size() + (0 if w_t is None else w_t.element_size()))
    if device.type == "cpu" and _WHOLE_ROWS * per_row <= _WHOLE_BYTES:
        return _WHOLE_ROWS
    rows = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // per_row
    even = 8 if device.type == "cpu" or rows < _EVEN_ROWS else _EVEN_ROWS
    rows = max(16, rows // even * even)
    share = -(-count // max(1, -(-count // rows)))
    return -(-share // even) * even


def tile_rows(compiled: bool, z_s: Tensor, z_t: Tensor | None, device: torch.device) -> int:
    """Rows of a chunk that an elementwise pass, no GPU kernel, takes at once: on a CPU so few that what it makes stays in the
    cache, on a GPU so few that it makes no more than about what the chunk takes."""
    if device.type != "cpu":
        return -(-len(z_s) // _TEMPORARIES)
    if not compiled:
        return max(1, _TILE_ELEMENTS // z_s.shape[1])
    per_row = z_s.shape[1] * (z_s.element_size() + (0 if z_t is None else z_t.element_size()))
    return max(2, _COMPILED_TILE_BYTES // per_row // 2 * 2)  # an odd row would leave a core idle


def row_width(vocab: int, device: torch.device) -> int:
    """The numbers from one row of a buffer to the next."""
    return vocab if device.type == "cpu" else -(-vocab // ROUND) * ROUND


def make_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, vocab] of memory; on a GPU each row begins at a round address, where products and kernels read fastest."""
    return torch.empty(rows, row_width(vocab, device), dtype=dtype, device=device)[:, :vocab]


def shared_bias(bias: Tensor | None, vocab: int, dtype: torch.dtype) -> Tensor | None:
    """The bias of the shared vocabulary's tokens."""
    return None if bias is None else bias[:vocab].to(dtype).clamp_min(LOWEST)


def head_product(h: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """h [n, H] · weightᵀ [H, V] → out [n, V].

    With few rows the BLAS of a CPU is some 20 % faster on strips of the head that stay in its cache.
    """
    if h.device.type != "cpu" or h.dtype is not torch.float32:
        return torch.mm(h, weight.t(), out=out)
    for low in range(0, len(weight), _STRIP):
        torch.mm(h, weight[low : low + _STRIP].t(), out=out[:, low : low + _STRIP])
    return out


def add_product(d_weight: Tensor, dz: Tensor, h: Tensor) -> None:
    """d_weight [V, H] += dzᵀ h, summed in d_weight's precision, without a second buffer of the head's size."""
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
    """grad *= scale, where a scale of more digits than grad keeps them."""
    if grad.dtype == scale.dtype:
        grad.mul_(scale)
        return
    for part in grad.split(max(1, (1 << 24) // max(1, grad[:1].numel()))):
        part.copy_(part.to(scale.dtype) * scale)


def narrowed(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in its parameter's dtype; a narrower one is written over the sums, which are the largest tensor around."""
    if dtype.itemsize >= grad.element_size():
        return grad.to(dtype)
    wide = grad.view(-1)
    narrow = wide.view(dtype)[: wide.numel()]
    for low in range(0, wide.numel(), 1 << 20):
        narrow[low : low + (1 << 20)] = wide[low : low + (1 << 20)].to(dtype)
    return narrow.view(grad.shape)


@cache
def keep_freed_tiles() -> None:
    """Let glibc hand a tile's temporaries to the next tile: fresh pages cost as much as the arithmetic.

    Its threshold for giving memory back rises to twice the largest block below 32 MiB that was ever freed (mallopt(3)).
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)


@cache
def _adds_wider(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether this machine adds a product of narrow matrices to a wide one in place, without rounding between."""
    if device.type != "cuda":
        return False
    total, ones = torch.ones(16, 16, dtype=wide, device=device), torch.ones(16, 16, dtype=narrow, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=wide, out=total)
    except (RuntimeError, TypeError):  # PyTorch before it took a wider sum, or a GPU without
        return False
    return bool((total == 17).all())
