"""Matrix products with an output head, at widths that tensor cores multiply at full speed.

Shared vocabularies rarely have a round size: Qwen2.5 has 151 665 tokens. A GPU multiplies half-precision matrices at full speed
only if their width is a multiple of 8, and fastest at multiples of 64. Logits are therefore computed in rows of the next
multiple. The head's rows up to the last multiple below are used in place. The few that remain are copied to a small matrix of
zeros, so no row beyond the vocabulary is ever read, and the head may end there. Columns beyond the vocabulary are products with
zeros, take no part in the loss and keep a gradient of 0.

Shapes: n positions of a chunk, V vocabulary, W the next multiple, H hidden size.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_MULTIPLE = {"cuda": 64}  # CPUs do not need one
_STRIP = 1024  # rows of the head in one product on a CPU


def aligned_width(vocab: int, device: torch.device) -> int:
    """W, the columns of a row of logits in memory."""
    multiple = _MULTIPLE.get(device.type, 1)
    return -(-vocab // multiple) * multiple


class AlignedHead:
    """The first ``vocab`` rows of a head [rows, H] in ``dtype``, for products of width W on ``device``.

    Attributes:
        vocab: V.
        width: W.
    """

    def __init__(self, weight: Tensor, vocab: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.vocab, self.width = vocab, aligned_width(vocab, device or weight.device)
        used = weight[:vocab].to(dtype)
        if self.width == vocab:
            self.main, self.tail = used, None
            return
        multiple = _MULTIPLE[(device or weight.device).type]
        self.main = used[: vocab // multiple * multiple]
        rest = used[len(self.main) :]
        self.tail = torch.cat([rest, rest.new_zeros(multiple - len(rest), rest.shape[1])])

    def buffer(self, rows: int) -> Tensor:
        """An uninitialized buffer [rows, W] for ``logits``."""
        return torch.empty(rows, self.width, dtype=self.main.dtype, device=self.main.device)

    def logits(self, h: Tensor, out: Tensor) -> Tensor:
        """Write h [n, H] · headᵀ to out [n, W]. Returns the logits, a view [n, V] of ``out``.

        For few rows, the BLAS of a CPU is about 20 % faster on strips of the head that fit in its cache.
        """
        even = len(self.main)
        if h.device.type == "cpu" and h.dtype is torch.float32:
            for low in range(0, even, _STRIP):
                torch.mm(h, self.main[low : low + _STRIP].t(), out=out[:, low : min(low + _STRIP, even)])
        else:
            torch.mm(h, self.main.t(), out=out[:, :even])
        if self.tail is not None:
            torch.mm(h, self.tail.t(), out=out[:, even:])
        return out[:, : self.vocab]

    def hidden_grad(self, dz: Tensor) -> Tensor:
        """The gradient [n, H] of the hidden states from that of the logits, dz [n, W]."""
        even = len(self.main)
        if self.tail is None:
            return torch.mm(dz, self.main)
        return torch.addmm(torch.mm(dz[:, even:], self.tail), dz[:, :even], self.main)

    def add_weight_grad(self, d_weight: Tensor, dz: Tensor, h: Tensor, *, first: bool = False) -> None:
        """Add the head's gradient dzᵀ h, of dz [n, W] and h [n, H], to d_weight [rows, H].

        first: d_weight is not initialized; it is overwritten.
        """
        even = len(self.main)
        add_product(d_weight[:even], dz[:, :even], h, beta=0 if first else 1)
        if first:
            d_weight[even:] = 0
        if self.tail is not None:
            d_tail = torch.empty(self.tail.shape, dtype=d_weight.dtype, device=d_weight.device)
            add_product(d_tail, dz[:, even:], h, beta=0)
            d_weight[even : self.vocab] += d_tail[: self.vocab - even]


def add_product(d_weight: Tensor, dz: Tensor, h: Tensor, *, beta: int = 1) -> None:
    """d_weight [V, H] = beta · d_weight + dz [n, V]ᵀ h [n, H], in the precision of d_weight, without a second buffer of the
    head's size. With a beta of 0, d_weight is not read.
    """
    if dz.dtype == d_weight.dtype:
        d_weight.addmm_(dz.t(), h, beta=beta)
        return
    if not beta:
        d_weight.zero_()
    if _adds_wider(d_weight.device, dz.dtype, d_weight.dtype):
        torch.addmm(d_weight, dz.t(), h, out_dtype=d_weight.dtype, out=d_weight)
        return
    step = max(1, (1 << 22) // d_weight.shape[1])
    for low in range(0, d_weight.shape[0], step):
        d_weight[low : low + step] += torch.mm(dz[:, low : low + step].t(), h)


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
