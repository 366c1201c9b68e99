"""Whole states are cut into the shards of every rank as the mesh divides them, also where the sizes do not fit."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from limbeck.strategies.shards import flat_boxes
from limbeck.strategies.state import (
    iter_model,
    load_model_state,
    load_optimizer_state,
    model_shards,
    optimizer_shards,
)


@contextmanager
def mesh_of(rank: int, sizes: dict[str, int]) -> Iterator[DeviceMesh]:
    """A mesh of ranks of which only ``rank`` exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    size = torch.Size(sizes.values()).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    finally:
        _clear_sharding_prop_cache()  # which knows the groups by their names
        dist.destroy_process_group()


def chunk(tensor: Tensor, parts: int, index: int, dim: int) -> Tensor:
    """Part ``index`` of ``parts``: of the rounded-up width, the last ones shorter or empty."""
    width = -(-tensor.shape[dim] // parts)
    low = min(index * width, tensor.shape[dim])
    return tensor.narrow(dim, low, min(width, tensor.shape[dim] - low))


def sharded_model(full: Tensor, local: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> nn.Module:
    model = nn.Module()
    value = DTensor.from_local(
        torch.zeros_like(local), mesh, placements, shape=full.shape, stride=full.stride(), run_check=False
    )
    model.weight = nn.Parameter(value)
    model.frozen = nn.Parameter(torch.full((2,), 5.0), requires_grad=False)
    return model


CASES = [
    # sizes, placements, and by which dimensions the tensor is cut in this order
    ({"dp_shard": 3}, [Shard(0)], [("dp_shard", 0)]),
    ({"dp_shard": 6}, [Shard(0)], [("dp_shard", 0)]),
    ({"dp_replicate": 2, "dp_shard": 2}, [Replicate(), Shard(0)], [("dp_shard", 0)]),
    ({"dp_shard": 2, "tp": 2}, [Shard(0), Shard(1)], [("tp", 1), ("dp_shard", 0)]),
    # FSDP shards the slice of a tensor-parallel rank.
    ({"dp_shard": 2, "tp": 2}, [Shard(0), Shard(0)], [("tp", 0), ("dp_shard", 0)]),
    ({"dp_shard": 2, "tp": 2}, [Shard(0), Replicate()], [("dp_shard", 0)]),
]


@pytest.mark.parametrize(("sizes", "placements", "cuts"), CASES)
def test_every_rank_gets_its_shard_of_the_weights_and_moments(sizes, placements, cuts):
    full = torch.arange(20.0).view(5, 4)
    for rank in range(torch.Size(sizes.values()).numel()):
        with mesh_of(rank, sizes) as mesh:
            place = dict(zip(sizes, mesh.get_coordinate(), strict=True))
            expected = full
            for name, dim in cuts:
                expected = chunk(expected, sizes[name], place[name], dim)
            model = sharded_model(full, expected, mesh, placements)
            load_model_state(model, {"weight": full})
            torch.testing.assert_close(model.weight.to_local(), expected, rtol=0, atol=0)
            assert model.frozen.tolist() == [5.0, 5.0]
            optimizer = torch.optim.AdamW([model.weight], lr=0.25, weight_decay=0.0)
            moments = {"weight|exp_avg": full + 1, "weight|exp_avg_sq": full + 2, "weight|step": torch.tensor(9.0)}
            load_optimizer_state(model, optimizer, moments)
            state = optimizer.state[model.weight]
            torch.testing.assert_close(state["exp_avg"].to_local(), expected + 1, rtol=0, atol=0)
            torch.testing.assert_close(state["exp_avg_sq"].to_local(), expected + 2, rtol=0, atol=0)
            assert state["step"].item() == 9.0
            torch.testing.assert_close(model.weight.to_local(), expected, rtol=0, atol=0)
            assert optimizer.param_groups[0]["lr"] == 0.25
            held = model_shards(model, ["weight"]) | optimizer_shards(model, optimizer)
            for name, whole in (("weight", full), ("weight|exp_avg", full + 1), ("weight|exp_avg_sq", full + 2)):
                (shard,) = held[name]
                assert shard.shape == (5, 4)
                torch.testing.assert_close(shard.read(), whole[shard.box], rtol=0, atol=0)
                torch.testing.assert_close(shard.read(), expected + (whole - full)[0, 0], rtol=0, atol=0)
            assert [part.shape for part in held["weight|step"]] == [()]


def test_what_a_rank_holds_is_read_as_plain_tensors():
    full = torch.arange(20.0).view(5, 4)
    with mesh_of(0, {"dp_shard": 1}) as mesh:
        model = sharded_model(full, full, mesh, [Shard(0)])
        load_model_state(model, {"weight": full})
        optimizer = torch.optim.AdamW([model.weight])
        load_optimizer_state(
            model, optimizer,
            {"weight|exp_avg": full, "weight|exp_avg_sq": full, "weight|step": torch.tensor(1.0)},
        )  # fmt: skip
        held = model_shards(model, ["weight"]) | optimizer_shards(model, optimizer)
        assert held.keys() == {"weight", "weight|exp_avg", "weight|exp_avg_sq", "weight|step"}
        assert all(type(part.read()) is Tensor for (part,) in held.values())
        weights = dict(iter_model(model))
        assert weights.keys() == {"weight", "frozen"}
        assert not any(isinstance(value, DTensor) or value.requires_grad for value in weights.values())


def test_only_names_under_the_prefix_are_given_without_it():
    root = nn.Module()
    root.model, root.features = nn.Linear(2, 2), nn.Linear(3, 3)
    assert {name: tuple(value.shape) for name, value in iter_model(root, "model.")} == {"weight": (2, 2), "bias": (2,)}
    assert model_shards(root, ["features.bias"]).keys() == {"features.bias"}


def test_a_range_of_a_flattened_tensor_is_a_few_boxes():
    generator = random.Random(0)
    for _ in range(300):
        shape = [generator.randint(1, 4) for _ in range(generator.randint(0, 4))]
        tensor = torch.arange(math.prod(shape)).view(shape)
        start, stop = sorted(generator.randint(0, tensor.numel()) for _ in range(2))
        boxes = list(flat_boxes(shape, start, stop))
        found = [value for box in boxes for value in tensor[box].flatten().tolist()]
        assert found == list(range(start, stop)), (shape, start, stop)
        assert len(boxes) < max(2, 2 * len(shape)), (shape, start, stop)
