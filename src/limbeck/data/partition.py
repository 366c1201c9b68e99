"""Load balancing: partitions lengths into bins with nearly equal sums.

Every rank partitions the whole step itself and must get the same result, so everything here is a pure function of lengths.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

Groups = list[list[int]]


def partition_balanced(lengths: Sequence[int], bins: int, most: int = 0) -> Groups:
    """Partitions the indices of ``lengths`` into ``bins`` groups of nearly equal sums, with at most ``most`` in each.

    Longest-processing-time-first (Graham, 1969): the longest remaining item goes to the bin with the smallest sum. The
    largest sum is at most 4/3 of the optimum. ``most = 0`` sets no limit.
    """
    assigned: Groups = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, number = heapq.heappop(heap)
        assigned[number].append(index)
        if len(assigned[number]) != most:
            heapq.heappush(heap, (total + lengths[index], number))
    return assigned


def partition_within_budget(lengths: Sequence[int], budget: int, ranks: int) -> Groups:
    """Partitions into as few bins as possible whose sums are at most ``budget``; their number is a multiple of ``ranks``.

    None of ``lengths`` may exceed ``budget``.
    """
    rounds = max(1, -(-sum(lengths) // (budget * ranks)))
    while True:
        assigned = partition_balanced(lengths, rounds * ranks)
        if max(sum(lengths[i] for i in group) for group in assigned) <= budget:
            return assigned
        rounds += 1


def partition_neighbours_within_budget(
    lengths: Sequence[int], budget: int, ranks: int, padded: Callable[[int], int]
) -> Groups:
    """Groups items of similar length so that items × padded longest length ≤ ``budget`` in each group.

    Makes as few groups as possible, a multiple of ``ranks``, of similar size. ``len(lengths)`` must be a multiple of
    ``ranks`` too, so that no group is empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    slots = [padded(lengths[i]) for i in order]

    def cut(most: int) -> list[tuple[int, int]]:
        bounds, start = [], 0
        while start < len(order):
            stop = min(len(order), start + most // slots[start])
            bounds.append((start, stop))
            start = stop
        return bounds

    count = -(-len(cut(budget)) // ranks) * ranks
    even = _cut_evenly([lengths[i] for i in order], count)
    if all(_area(bounds, slots) <= budget for bounds in even):
        return [order[start:stop] for start, stop in sorted(even, key=lambda b: -_area(b, slots))]
    low, high = slots[0], budget  # the smallest budget that needs no more groups makes them similar
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= count else (middle + 1, high)
    bounds = cut(high)
    while len(bounds) < count:
        where = max((i for i, (a, b) in enumerate(bounds) if b - a > 1), key=lambda i: _area(bounds[i], slots))
        start, stop = bounds[where]
        bounds[where : where + 1] = [(start, (start + stop) // 2), ((start + stop) // 2, stop)]
    return [order[start:stop] for start, stop in sorted(bounds, key=lambda b: -_area(b, slots))]


def _cut_evenly(lengths: Sequence[int], groups: int) -> list[tuple[int, int]]:
    """Cuts a sequence into ``groups`` non-empty contiguous parts with similar sums."""
    reached = [0, *accumulate(lengths)]
    stops = [0]
    for group in range(1, groups):
        wanted = reached[-1] * group / groups
        after = bisect_left(reached, wanted)
        nearest = after if reached[after] - wanted <= wanted - reached[after - 1] else after - 1
        stops.append(min(max(nearest, stops[-1] + 1), len(lengths) - groups + group))
    return list(pairwise([*stops, len(lengths)]))


def _area(bounds: tuple[int, int], slots: Sequence[int]) -> int:
    return (bounds[1] - bounds[0]) * slots[bounds[0]]
