"""JSON values and errors of every rank, on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from limbeck.errors import LimbeckError, WritingError
from limbeck.strategies.world import World

Result = TypeVar("Result")


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


def agree(call: Callable[[], Result], world: World) -> Result:
    """What ``call`` returns on this rank. Collective.

    Raises:
        WritingError: if it raised LimbeckError on any rank; on every rank, so that they can save together.
    """
    result, failure = None, None
    try:
        result = call()
    except LimbeckError as error:
        failure = error
    for sentence in gather_json(None if failure is None else str(failure), world):
        if sentence is not None:
            raise WritingError(sentence) from failure
    return cast(Result, result)
