"""All rank arithmetic agrees with an explicit array of ranks, and every process group with the ranks that it names."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.config.schema import StrategyConfig
from limbeck.errors import LimbeckError
from limbeck.strategies.parallel_dims import Coordinates, ParallelDims, forget_meshes, join_or

AXES = ("dp_replicate", "dp_shard", "pp", "cp", "tp")
SIZES = st.builds(ParallelDims, **{axis: st.integers(1, 4) for axis in AXES})


def ranks_of(dims: ParallelDims) -> np.ndarray:
    """[dp_replicate, dp_shard, pp, cp, tp] ranks, tensor-parallel ones closest together."""
    return np.arange(dims.size).reshape([getattr(dims, axis) for axis in AXES])


def neighbours(dims: ParallelDims, rank: int, axes: tuple[str, ...]) -> list[int]:
    """The ranks that differ from ``rank`` along ``axes`` at most, in order."""
    place = np.argwhere(ranks_of(dims) == rank)[0]
    index = tuple(slice(None) if axis in axes else place[i] for i, axis in enumerate(AXES))
    return ranks_of(dims)[index].flatten().tolist()


@settings(deadline=None, max_examples=60)
@given(SIZES)
def test_coordinates_and_ranks_correspond_one_to_one(dims):
    grid = ranks_of(dims)
    found = [dims.coordinates(rank) for rank in range(dims.size)]
    assert len(set(found)) == dims.size == grid.size
    assert all(grid[place] == rank for rank, place in enumerate(found))
    assert Coordinates._fields == AXES


@settings(deadline=None, max_examples=60)
@given(SIZES)
def test_counts_are_those_of_the_array(dims):
    grid = ranks_of(dims)
    assert dims.data_size == grid[:, :, 0, 0, 0].size
    assert dims.model_parallel_size == grid[0, 0].size
    assert dims.replica_size == grid[0].size
    assert dims.gradient_parts == grid[:, :, 0, :, 0].size
    assert dims.loss_ranks == grid[:, :, -1].size
    assert [dims.rank_at(pp=stage) for stage in range(dims.pp)] == grid[0, 0, :, 0, 0].tolist()


@settings(deadline=None, max_examples=60)
@given(SIZES)
def test_ranks_of_one_model_group_read_the_same_rows_and_have_one_leader(dims):
    groups = ranks_of(dims).reshape(dims.data_size, -1)
    for part, group in enumerate(groups):
        assert {dims.data_rank(rank) for rank in group} == {part}
        assert [rank for rank in group if dims.leads_model_group(rank)] == [group[0]]


@settings(deadline=None, max_examples=60)
@given(SIZES)
def test_every_rank_is_in_one_pipeline_in_the_order_of_the_stages(dims):
    grid = ranks_of(dims)
    expected = {
        tuple(grid[replicate, shard, :, cp, tp].tolist())
        for replicate, shard, cp, tp in np.ndindex(dims.dp_replicate, dims.dp_shard, dims.cp, dims.tp)
    }
    found = [tuple(pipeline) for pipeline in dims.pipelines().tolist()]
    assert set(found) == expected
    assert len(found) == len(expected)


@settings(deadline=None, max_examples=200)
@given(
    data=st.integers(1, 6), tp=st.integers(1, 3), cp=st.integers(1, 3), pp=st.integers(1, 3),
    fsdp_size=st.one_of(st.none(), st.integers(2, 20)), replicate=st.booleans(), shard=st.booleans(),
)  # fmt: skip
def test_a_configuration_shards_as_many_ranks_as_it_names(data, tp, cp, pp, fsdp_size, replicate, shard):
    config = StrategyConfig(
        tensor_model_parallel_size=tp, context_parallel_size=cp, pipeline_model_parallel_size=pp,
        fsdp_size=fsdp_size, replicate=replicate,
    )  # fmt: skip
    ranks, sharing = data * tp * cp * pp, data * cp
    whole = fsdp_size is None or fsdp_size >= sharing
    if shard and not replicate and not whole and (sharing % fsdp_size or fsdp_size % cp):
        with pytest.raises(LimbeckError, match=rf"fsdp_size = {fsdp_size} (does not divide|is not a multiple)"):
            ParallelDims.from_config(config, ranks, "student", shard=shard)
        return
    dims = ParallelDims.from_config(config, ranks, "student", shard=shard)
    assert (dims.size, dims.tp, dims.cp, dims.pp, dims.data_size) == (ranks, tp, cp, pp, data)
    if replicate or not shard:
        assert (dims.dp_shard, dims.dp_replicate) == (1, data)
    else:  # fsdp_size counts the context-parallel ranks, which share parameters too
        assert dims.dp_shard * cp == (sharing if whole else fsdp_size)


def test_sizes_that_do_not_divide_the_ranks_are_an_error_with_those_that_do():
    config = StrategyConfig(tensor_model_parallel_size=4)
    with pytest.raises(
        LimbeckError, match="= 4 × 1 × 1 does not divide the 6 processes; make their product 1, 2, 3 or 6"
    ):
        ParallelDims.from_config(config, 6, "student")
    with pytest.raises(LimbeckError, match="does not divide the 1 process; make their product 1,"):
        ParallelDims.from_config(config, 1, "student")


def test_an_fsdp_size_that_does_not_fit_is_an_error_with_the_remedy():
    uneven = StrategyConfig(fsdp_size=3)
    with pytest.raises(
        LimbeckError, match=r"student: strategy_config.fsdp_size = 3 does not divide the 4 processes.*leave it unset"
    ):
        ParallelDims.from_config(uneven, 4, "student")
    sliced = StrategyConfig(fsdp_size=3, tensor_model_parallel_size=2)
    with pytest.raises(LimbeckError, match="does not divide the 4 groups of 2 tensor ranks"):
        ParallelDims.from_config(sliced, 8, "teacher")
    across = StrategyConfig(fsdp_size=3, context_parallel_size=2)
    with pytest.raises(LimbeckError, match=r"is not a multiple of context_parallel_size = 2.*leave it unset"):
        ParallelDims.from_config(across, 12, "student")


def test_sequence_parallelism_is_taken_over_and_described():
    config = StrategyConfig(
        tensor_model_parallel_size=2, context_parallel_size=3, pipeline_model_parallel_size=4, sequence_parallel=True
    )
    dims = ParallelDims.from_config(config, 24, "student")
    assert dims.describe() == "matrices over 2 ranks with sequence parallelism, rows over 3, layers over 4"
    assert ParallelDims(dp_shard=4).describe() == ""
    assert ParallelDims(tp=2).describe() == "matrices over 2 ranks"


def test_experts_are_divided_between_neighbours_on_a_stage():
    config = StrategyConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, megatron={"expert_model_parallel_size": 2}
    )
    dims = ParallelDims.from_config(config, 16, "student", shard=False)
    assert (dims.dp_shard, dims.dp_replicate, dims.data_size, dims.replica_size) == (2, 2, 4, 8)
    assert dims.describe() == "matrices over 2 ranks, layers over 2, experts over 2"
    # [stage, copy, experts, slices]
    assert dims.expert_ranks()[0].tolist() == [[[0, 1], [4, 5]], [[8, 9], [12, 13]]]
    assert dims.expert_ranks()[1].tolist() == [[[2, 3], [6, 7]], [[10, 11], [14, 15]]]


def test_expert_sizes_that_do_not_fit_are_an_error_with_those_that_do():
    three = StrategyConfig(megatron={"expert_model_parallel_size": 3})
    with pytest.raises(
        LimbeckError, match=r"expert_model_parallel_size = 3 does not divide the 4 ranks.*use 1, 2 or 4"
    ):
        ParallelDims.from_config(three, 4, "student", shard=False)
    slices = StrategyConfig(tensor_model_parallel_size=4, megatron={"expert_tensor_parallel_size": 2})
    with pytest.raises(LimbeckError, match=r"expert_tensor_parallel_size = 2 is neither 1 nor tensor_.*= 4"):
        ParallelDims.from_config(slices, 4, "teacher", shard=False)


def test_sizes_are_listed_in_words():
    assert [join_or([1]), join_or([1, 2]), join_or([1, 2, 4])] == ["1", "1 or 2", "1, 2 or 4"]


@contextmanager
def rank_of(dims: ParallelDims, rank: int) -> Iterator[None]:
    """A process group of ``dims.size`` ranks, of which only ``rank`` exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dims.size)
    try:
        yield
    finally:
        forget_meshes()
        dist.destroy_process_group()


LAYOUTS = [
    ParallelDims(),
    ParallelDims(dp_shard=4),
    ParallelDims(dp_replicate=2, dp_shard=2),
    ParallelDims(dp_replicate=4),
    ParallelDims(dp_shard=2, tp=2),
    ParallelDims(dp_shard=1, cp=4),
    ParallelDims(dp_shard=2, cp=2),
    ParallelDims(dp_replicate=2, dp_shard=2, cp=2, tp=2),
    ParallelDims(dp_replicate=2, cp=2, tp=2),
    ParallelDims(dp_replicate=3, dp_shard=1, cp=2),
    ParallelDims(dp_shard=2, pp=2, cp=2, tp=2),
    ParallelDims(dp_replicate=2, dp_shard=2, pp=2),
    ParallelDims(pp=3, tp=2),
    ParallelDims(dp_replicate=2, dp_shard=1, pp=2, cp=2, tp=2),
]
NAMES = [
    ",".join(f"{axis}{getattr(dims, axis)}" for axis in AXES if getattr(dims, axis) > 1) or "alone" for dims in LAYOUTS
]


def some_ranks(dims: ParallelDims) -> set[int]:
    return {0, dims.size // 2, dims.size - 1, dims.size // 3}


@pytest.mark.parametrize("dims", LAYOUTS, ids=NAMES)
def test_a_group_has_the_ranks_that_differ_along_its_axis(dims):
    for rank in some_ranks(dims):
        with rank_of(dims, rank):
            for axis in AXES:
                group = dims.group("cpu", axis)
                if getattr(dims, axis) == 1:
                    assert group is None
                else:
                    assert dist.get_process_group_ranks(group) == neighbours(dims, rank, (axis,)), axis
            model_group = dims.model_group("cpu")
            if dims.model_parallel_size == 1:
                assert model_group is None
            else:
                assert dist.get_process_group_ranks(model_group) == neighbours(dims, rank, ("pp", "cp", "tp"))


@pytest.mark.parametrize(
    ("dims", "replicate"),
    # A configuration with replicate has dp_shard = 1.
    [(dims, replicate) for dims in LAYOUTS for replicate in (False, True) if dims.dp_shard == 1 or not replicate],
)
def test_fsdp_shards_over_data_and_context_ranks_and_copies_over_the_rest(dims, replicate):
    shard_axes = ("dp_shard",) if replicate else ("dp_shard", "cp")
    copy_axes = ("dp_replicate", "cp") if replicate else ("dp_replicate",)
    for rank in some_ranks(dims):
        with rank_of(dims, rank):
            mesh = dims.fsdp_mesh("cpu", replicate=replicate)
            copies, shards = (neighbours(dims, rank, axes) for axes in (copy_axes, shard_axes))
            groups = [dist.get_process_group_ranks(group) for group in mesh.get_all_groups()]
            assert groups == ([copies, shards] if len(copies) > 1 else [shards])
            assert mesh.ndim == len(groups)


def test_a_mesh_is_made_once_and_has_the_dimensions_in_use():
    dims = ParallelDims(dp_replicate=2, cp=2)
    with rank_of(dims, 0):
        assert dims.mesh("cpu") is dims.mesh("cpu")
        assert dims.mesh("cpu").mesh_dim_names == ("dp_replicate", "dp_shard", "cp")
        first = dims.mesh("cpu")
    with rank_of(dims, 1):
        assert dims.mesh("cpu") is not first
