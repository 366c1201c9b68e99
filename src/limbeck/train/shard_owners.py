"""Which rank writes which part of the state: parts that several ranks hold are written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from limbeck.strategies.base import EngineState
from limbeck.strategies.shards import Shard
from limbeck.strategies.world import World
from limbeck.train.gather import gather_json

Owned = Mapping[str, set[tuple[int, ...]]]
"""Offsets of the parts that this rank writes, by parameter."""


def assign_shards(state: EngineState[Sequence[Shard]], world: World) -> Owned:
    """The parts of each parameter that this rank writes. Collective.

    Beginning with the largest, a part goes to that of its holders which has the fewest values so far, so replicas share the
    work.
    """
    held = {name: [[list(part.offsets), part.size] for part in parts] for name, parts in state.model.items()}
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    sizes = {}
    for rank, layout in enumerate(gather_json(held, world)):
        for name, parts in layout.items():
            for offsets, size in parts:
                if size:
                    holders.setdefault((name, tuple(offsets)), []).append(rank)
                    sizes[name, tuple(offsets)] = size
    load = [0] * world.size
    owned: dict[str, set[tuple[int, ...]]] = {}
    for name, offsets in sorted(holders, key=lambda part: (-sizes[part], part)):
        rank = min(holders[name, offsets], key=lambda rank: load[rank])
        load[rank] += sizes[name, offsets]
        if rank == world.rank:
            owned.setdefault(name, set()).add(offsets)
    return owned


def owned_shards(
    state: EngineState[Sequence[Shard]], owned: Owned
) -> tuple[dict[str, list[Shard]], dict[str, list[Shard]]]:
    """The parts of parameters and optimizer that this rank writes. What is not divided as its parameter is, such as a step
    count, goes with the first part of the parameter.
    """
    shapes = {name: parts[0].shape for name, parts in state.model.items() if parts}

    def own(key: str, parts: Sequence[Shard]) -> list[Shard]:
        name = key.partition("|")[0]
        mine = owned.get(name, set())
        origin = (0,) * len(shapes.get(name, ()))
        return [part for part in parts if (part.offsets if part.shape == shapes.get(name) else origin) in mine]

    def select(shards: Mapping[str, Sequence[Shard]]) -> dict[str, list[Shard]]:
        return {key: mine for key, parts in shards.items() if (mine := own(key, parts))}

    return select(state.model), select(state.optimizer)
