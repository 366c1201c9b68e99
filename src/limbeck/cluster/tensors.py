"""Tensors through Ray's object store: as flat arrays that readers on the same machine see without a copy, read-only.

Ray's own way would pickle a tensor, one copy more on each side. bfloat16 and float16 travel as their bits.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class Flat:
    """A tensor on its way. bits: its memory as bytes in one piece; dtype: torch's name of its numbers."""

    bits: np.ndarray[Any, Any]
    dtype: str
    shape: tuple[int, ...]


def flat(tensor: Tensor) -> Flat:
    """``tensor`` as it travels; copied to the host if it is not there."""
    whole = tensor.detach().cpu().contiguous()
    return Flat(whole.flatten().view(torch.uint8).numpy(), str(whole.dtype).removeprefix("torch."), tuple(whole.shape))


def unflat(came: Flat) -> Tensor:
    """The tensor that came; its memory belongs to the store, so it must not be written to."""
    dtype: torch.dtype = getattr(torch, came.dtype)
    if not came.bits.size:
        return torch.empty(came.shape, dtype=dtype)
    return torch.from_numpy(came.bits).view(dtype).view(came.shape)
