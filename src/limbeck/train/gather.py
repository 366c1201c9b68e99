"""JSON values of every rank, on every rank."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from limbeck.strategies.world import World


def gather_json(value: Any, world: World, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, in their order. Collective; each rank may have a value of another size.

    group: a gloo group of all ranks, by default the one of training on its device.
    """
    if world.size == 1:
        return [value]
    device = world.device if group is None else "cpu"
    own = torch.frombuffer(bytearray(json.dumps(value), "utf-8"), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(own)], device=device), group=group)
    longest = max(int(size) for size in sizes)
    parts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world.size)]
    dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))), group=group)
    return [json.loads(part[: int(size)].cpu().numpy().tobytes()) for size, part in zip(sizes, parts, strict=True)]
