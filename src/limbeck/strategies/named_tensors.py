"""Dicts of tensors between the ranks of a process group, without pickle: a JSON header, then the tensors.

Any number of tensors of any shape and dtype. The receiver needs to know nothing in advance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast_named(
    tensors: Mapping[str, Tensor] | None, group: dist.ProcessGroup, source: int, device: torch.device | str
) -> dict[str, Tensor]:
    """``tensors`` of rank ``source`` (within ``group``) on all its ranks, on ``device``; the others pass anything."""

    def share(tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, group=group, group_src=source)
        return tensor

    if dist.get_rank(group) == source:
        return _send(tensors or {}, share, device)
    return _receive(share, device)


def _send(
    tensors: Mapping[str, Tensor], transmit: Callable[[Tensor], Tensor], device: torch.device | str
) -> dict[str, Tensor]:
    described = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}
    header = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8).to(device)
    transmit(torch.tensor([header.numel()], device=device))
    transmit(header)
    return {name: transmit(tensor.to(device).contiguous()) for name, tensor in tensors.items()}


def _receive(transmit: Callable[[Tensor], Tensor], device: torch.device | str) -> dict[str, Tensor]:
    size = int(transmit(torch.zeros(1, dtype=torch.int64, device=device)))
    header = transmit(torch.empty(size, dtype=torch.uint8, device=device))
    described = json.loads(header.cpu().numpy().tobytes())
    return {
        name: transmit(torch.empty(shape, dtype=getattr(torch, dtype), device=device))
        for name, (dtype, *shape) in described.items()
    }
