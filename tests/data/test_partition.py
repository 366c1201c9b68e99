"""Whatever is dealt is dealt once, within its bounds, and evenly."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data.partition import partition_balanced, partition_neighbours_within_budget, partition_within_budget

LENGTHS = st.lists(st.integers(1, 60), min_size=8, max_size=80)
PROPERTY = settings(max_examples=100, deadline=None)


def once(groups, lengths):
    return sorted(index for group in groups for index in group) == list(range(len(lengths)))


@given(lengths=LENGTHS, bins=st.integers(1, 8))
@PROPERTY
def test_sums_differ_by_no_more_than_the_longest(lengths, bins):
    groups = partition_balanced(lengths, bins)
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert once(groups, lengths)
    assert max(sums) - min(sums) <= max(lengths)


@given(lengths=LENGTHS, most=st.integers(1, 5))
@PROPERTY
def test_no_bin_holds_more_than_allowed(lengths, most):
    groups = partition_balanced(lengths, -(-len(lengths) // most), most)
    assert once(groups, lengths)
    assert max(map(len, groups)) <= most


@given(lengths=LENGTHS, budget=st.integers(60, 200), ranks=st.integers(1, 8))
@PROPERTY
def test_bins_keep_to_the_budget_in_a_multiple_of_the_ranks(lengths, budget, ranks):
    groups = partition_within_budget(lengths, budget, ranks)
    assert once(groups, lengths)
    assert len(groups) % ranks == 0
    assert max(sum(lengths[i] for i in group) for group in groups) <= budget


@given(lengths=LENGTHS, budget=st.integers(60, 400), ranks=st.sampled_from([1, 2, 4, 8]))
@PROPERTY
def test_neighbours_in_length_share_a_group_within_the_budget(lengths, budget, ranks):
    lengths = lengths[: len(lengths) // ranks * ranks]
    groups = partition_neighbours_within_budget(lengths, budget, ranks, lambda length: -(-length // 4) * 4)
    assert once(groups, lengths)
    assert len(groups) % ranks == 0
    assert all(groups)
    spans = sorted(((min(lengths[i] for i in g), max(lengths[i] for i in g)) for g in groups), reverse=True)
    assert all(low >= high for (low, _), (_, high) in pairwise(spans))
    assert max(len(g) * -(-max(lengths[i] for i in g) // 4) * 4 for g in groups) <= budget


@pytest.mark.parametrize("budget", [100, 101, 119])
def test_groups_are_even_rather_than_full(budget):
    groups = partition_neighbours_within_budget([20] * 12, budget, 2, lambda length: length)
    assert [len(group) for group in groups] == [3, 3, 3, 3]
