"""Packs tensors for Ray's object store as flat arrays, which readers on the same machine map read-only without a copy.

Ray would pickle a tensor, which costs one more copy on each side. bfloat16 and float16 travel as their bits.
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
class PackedTensor:
    """A tensor as bytes. bits: its contiguous memory, uint8; dtype: the name of its torch dtype."""

    bits: np.ndarray[Any, Any]
    dtype: str
    shape: tuple[int, ...]


def pack(tensor: Tensor) -> PackedTensor:
    """``tensor`` as bytes; copied to the host if it is not there."""
    whole = tensor.detach().cpu().contiguous()
    return PackedTensor(
        whole.flatten().view(torch.uint8).numpy(), str(whole.dtype).removeprefix("torch."), tuple(whole.shape)
    )


def unpack(packed: PackedTensor) -> Tensor:
    """The tensor; its memory belongs to the object store, so it must not be written to."""
    dtype: torch.dtype = getattr(torch, packed.dtype)
    if not packed.bits.size:
        return torch.empty(packed.shape, dtype=dtype)
    return torch.from_numpy(packed.bits).view(dtype).view(packed.shape)
