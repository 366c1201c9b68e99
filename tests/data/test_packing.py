"""Packs hold every row once, keep to their capacity, and are as few as the algorithm by its definition gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data.packing import ALGORITHMS, pack

CAPACITY = 60
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120).map(lambda found: sorted(found, reverse=True))


def contents(lengths, algorithm):
    packs = pack(np.array(lengths), CAPACITY, algorithm)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    assert (packs.starts[0], packs.starts[-1]) == (0, len(lengths))
    return [np.array(lengths)[part].tolist() for part in np.split(packs.members, packs.starts[1:-1])]


def best_fit_row_by_row(lengths):
    bins = []
    for length in lengths:
        fits = [held for held in bins if sum(held) + length <= CAPACITY]
        max(fits, key=sum).append(length) if fits else bins.append([length])
    return bins


def modified_first_fit_row_by_row(lengths):
    """The definition of Johnson and Garey, one row at a time."""
    left = [length for length in lengths if 2 * length <= CAPACITY]
    bins = [[length] for length in lengths if 2 * length > CAPACITY]
    is_medium = lambda length: 3 * length > CAPACITY  # noqa: E731
    is_small = lambda length: not is_medium(length) and 6 * length > CAPACITY  # noqa: E731

    def take(held, wanted, extra=0):
        fits = [length for length in left if wanted(length) and sum(held) + extra + length <= CAPACITY]
        if fits:
            left.remove(max(fits))
            held.append(max(fits))
        return bool(fits)

    for held in bins:
        take(held, is_medium)
    for held in reversed(bins):
        small = sorted(filter(is_small, left))
        if len(held) == 1 and len(small) > 1 and sum(held) + small[0] + small[1] <= CAPACITY:
            left.remove(small[0])
            take(held, is_small, small[0])
            held.append(small[0])
    for held in bins:
        while take(held, lambda length: True):
            pass
    while left:
        bins.append([])
        while take(bins[-1], lambda length: True):
            pass
    return bins


DEFINITIONS = {
    "best_fit_decreasing": best_fit_row_by_row,
    "modified_first_fit_decreasing": modified_first_fit_row_by_row,
}


def test_every_algorithm_has_its_definition_here():
    assert DEFINITIONS.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(lengths=LENGTHS)
@settings(max_examples=150, deadline=None)
def test_packs_are_those_of_the_definition(algorithm, lengths):
    found = contents(lengths, algorithm)
    assert max(map(sum, found)) <= CAPACITY
    assert sorted(map(sum, found)) == sorted(map(sum, DEFINITIONS[algorithm](lengths)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_many_rows_cost_little_more_than_few(algorithm):
    lengths = np.sort(np.clip(np.random.default_rng(0).lognormal(5.1, 0.36, 1_000_000).astype(int), 40, 512))[::-1]
    packs = pack(lengths, 512, algorithm)
    fill = lengths.sum() / 512 / (len(packs.starts) - 1)
    assert fill > 0.95
    sums = np.add.reduceat(lengths[packs.members], packs.starts[:-1])
    assert sums.max() <= 512
