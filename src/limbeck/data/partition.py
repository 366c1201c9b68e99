"""Who computes what of a step: lengths dealt to bins so that nobody waits long for the others.

Every rank deals the whole step by itself and must come to the same end, so everything here is a plain function of lengths.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

Groups = list[list[int]]


def partition_balanced(lengths: Sequence[int], bins: int, most: int = 0) -> Groups:
    """The indices of ``lengths`` in so many ``bins`` of nearly equal sums, at most ``most`` (if not 0) in each.

    Longest processing time first: each, the longest first, to the bin with the smallest sum. At most 4/3 of the best.
    """
    dealt: Groups = [[] for _ in range(bins)]
    heap = [(0, place) for place in range(bins)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, place = heapq.heappop(heap)
        dealt[place].append(index)
        if len(dealt[place]) != most:
            heapq.heappush(heap, (total + lengths[index], place))
    return dealt


def partition_within_budget(lengths: Sequence[int], budget: int, ranks: int) -> Groups:
    """The same in as few bins as hold at most ``budget`` each, none of ``lengths`` above it; a multiple of ``ranks``."""
    rounds = max(1, -(-sum(lengths) // (budget * ranks)))
    while True:
        dealt = partition_balanced(lengths, rounds * ranks)
        if max(sum(lengths[i] for i in group) for group in dealt) <= budget:
            return dealt
        rounds += 1


def partition_neighbours_within_budget(
    lengths: Sequence[int], budget: int, ranks: int, padded: Callable[[int], int]
) -> Groups:
    """Groups of similar length for padding: number in a group × padded longest ≤ ``budget``, as even as can be.

    As few groups as possible, in a multiple of ``ranks``; none is empty, for which ``len(lengths)`` must be one too.
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

    wanted = -(-len(cut(budget)) // ranks) * ranks
    even = _cut_evenly([lengths[i] for i in order], wanted)
    if all(_area(bounds, slots) <= budget for bounds in even):
        return [order[start:stop] for start, stop in sorted(even, key=lambda b: -_area(b, slots))]
    low, high = slots[0], budget  # the least budget that needs no more groups than wanted makes them even
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= wanted else (middle + 1, high)
    bounds = cut(high)
    while len(bounds) < wanted:
        where = max((i for i, (a, b) in enumerate(bounds) if b - a > 1), key=lambda i: _area(bounds[i], slots))
        start, stop = bounds[where]
        bounds[where : where + 1] = [(start, (start + stop) // 2), ((start + stop) // 2, stop)]
    return [order[start:stop] for start, stop in sorted(bounds, key=lambda b: -_area(b, slots))]


def _cut_evenly(lengths: Sequence[int], groups: int) -> list[tuple[int, int]]:
    """Neighbours in so many groups, none of them empty, whose sums are as even as neighbours allow."""
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
