"""Every part of the state is written by exactly one of the ranks that hold it."""

from collections import Counter
from unittest.mock import patch

import torch

from limbeck.strategies.base import EngineState
from limbeck.strategies.shards import Shard
from limbeck.strategies.world import World
from limbeck.train.shard_owners import assign_shards, owned_shards

ROWS = 4


def shard(shape: tuple[int, ...], rows: slice) -> Shard:
    box = (rows, *(slice(0, size) for size in shape[1:])) if shape else ()
    return Shard(shape, box, lambda: torch.zeros(()))


def state_of(rank: int) -> EngineState:
    """Four ranks: two replicas of two shards. The bias is whole everywhere; ``last`` is on the second pipeline stage only."""
    low = ROWS // 2 * (rank % 2)
    divided = [shard((ROWS, 3), slice(low, low + ROWS // 2))]
    model = {"weight": divided, "bias": [shard((3,), slice(0, 3))], "empty": [shard((1, 3), slice(rank % 2, 1))]}
    model |= {"last": [shard((5,), slice(0, 5))]} if rank >= 2 else {}
    optimizer = {f"{name}|exp_avg": parts for name, parts in model.items()}
    optimizer |= {f"{name}|step": [shard((), slice(0))] for name in model}
    return EngineState(model, optimizer)


def test_parts_are_written_once_and_replicas_share_the_work():
    layouts = [
        {name: [[list(part.offsets), part.size] for part in parts] for name, parts in state_of(rank).model.items()}
        for rank in range(4)
    ]
    written: Counter = Counter()
    sizes = []
    for rank in range(4):
        world, state = World(rank, 4, torch.device("cpu")), state_of(rank)
        with patch("limbeck.train.shard_owners.gather_json", return_value=layouts):
            owned = assign_shards(state, world)
        model, optimizer = owned_shards(state, owned)
        parts = [(key, part) for key, found in {**model, **optimizer}.items() for part in found]
        written.update((key, part.offsets) for key, part in parts)
        sizes.append(sum(part.size for _, part in parts))
    names = ("weight", "bias", "empty", "last")
    divided = {("weight", (low, 0)) for low in (0, 2)} | {("bias", (0,)), ("empty", (0, 0)), ("last", (0,))}
    moments = {(f"{name}|exp_avg", offsets) for name, offsets in divided}
    assert written == Counter({*divided, *moments, *((f"{name}|step", ()) for name in names)})
    assert sorted(sizes) == [7, 12, 13, 18]
