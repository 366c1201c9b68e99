"""Bin packing by tokens: which rows share a sequence.

Rows of the same length are interchangeable, so the algorithms work on kinds of bins (a pattern of lengths and how often it
occurs). Their cost depends on the number of distinct lengths, hardly on the number of rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Counts = list[tuple[int, int]]  # (length, number of rows of this length), by decreasing length


class Bins(NamedTuple):
    """``times`` bins with the same content: pairs of (length, number of rows)."""

    content: tuple[tuple[int, int], ...]
    times: int


class Packs(NamedTuple):
    """Pack i holds the rows ``members[starts[i] : starts[i + 1]]``, numbered by decreasing length."""

    members: Ints
    starts: Ints


def pack(lengths: Ints, capacity: int, algorithm: str) -> Packs:
    """Packs rows into sequences of at most ``capacity`` tokens.

    lengths: [rows] in decreasing order, none above ``capacity``. algorithm: a name in ``ALGORITHMS``.
    The result depends only on the lengths, so every epoch has the same number of packs.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    falling = list(zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True))
    first_place = dict(zip(distinct[::-1].tolist(), np.cumsum([0, *counts[::-1][:-1]]).tolist(), strict=True))
    members, sizes = [], []
    for content, times in ALGORITHMS[algorithm](falling, capacity):
        columns = []
        for length, count in content:
            here = first_place[length]
            first_place[length] = here + count * times
            columns.append(np.arange(here, here + count * times).reshape(times, count))
        table = np.concatenate(columns, axis=1)
        members.append(table.ravel())
        sizes.append(np.full(times, table.shape[1]))
    return Packs(np.concatenate(members), np.concatenate(([0], np.cumsum(np.concatenate(sizes)))))


def best_fit_decreasing(counts: Counts, capacity: int) -> list[Bins]:
    """Best-fit decreasing: the longest row first, into the fullest bin with room for it."""
    open_bins: defaultdict[int, list[Bins]] = defaultdict(list)  # free tokens -> bins
    free: list[int] = []  # the keys of open_bins that have a bin, sorted

    def put(room: int, bins: Bins) -> None:
        if not open_bins[room]:
            insort(free, room)
        open_bins[room].append(bins)

    for length, count in counts:
        while count:
            fit = bisect_left(free, length)
            if fit == len(free):
                room, kind = capacity, Bins((), count)
            else:
                room = free[fit]
                kind = open_bins[room].pop()
                if not open_bins[room]:
                    del free[fit]
            # This bin stays the fullest one with room, so further rows of this length go there too.
            each = min(room // length, count)
            times = min(kind.times, count // each)
            put(room - each * length, Bins((*kind.content, (length, each)), times))
            count -= each * times
            if kind.content and kind.times > times:
                put(room, Bins(kind.content, kind.times - times))
    return [bins for level in open_bins.values() for bins in level]


def modified_first_fit_decreasing(counts: Counts, capacity: int) -> list[Bins]:
    """Modified first-fit decreasing (Johnson and Garey, 1985), which first finds partners for the large rows.

    A row is large above a half of the capacity, medium above a third, and small above a sixth. Every large row opens a bin.
    Each bin gets a medium row if one fits. In reverse order, bins without one get two small rows. The remaining rows follow
    by first-fit decreasing.
    """
    left = dict(counts)
    large = [(length, count) for length, count in counts if 2 * length > capacity]
    bins = [Bins(((length, 1),), count) for length, count in large]
    for length, _ in large:
        del left[length]
    medium = [length for length in left if 3 * length > capacity]
    small = [length for length in left if 6 * length > capacity >= 3 * length]

    def partner(room: int, kind: Bins) -> tuple[tuple[int, int], ...]:
        fits = _largest(medium, left, room)
        return ((fits, 1),) if fits else ()

    def partners(room: int, kind: Bins) -> tuple[tuple[int, int], ...]:
        lowest = next((length for length in reversed(small) if left[length]), 0)
        if len(kind.content) > 1 or not lowest:
            return ()
        left[lowest] -= 1
        fits = _largest(small, left, room - lowest)
        left[lowest] += 1
        if not fits:
            return ()
        return ((lowest, 2),) if fits == lowest else ((fits, 1), (lowest, 1))

    def fill(room: int, kind: Bins) -> tuple[tuple[int, int], ...]:
        return _greedy(list(left), left, room)

    bins = list(_extended(bins, left, capacity, partner))
    bins = list(_extended(bins[::-1], left, capacity, partners))[::-1]
    bins = list(_extended(bins, left, capacity, fill))
    rest = Bins((), sum(left.values()))
    return bins + [kind for kind in _extended([rest], left, capacity, fill) if kind.content]


def _extended(
    bins: list[Bins],
    left: dict[int, int],
    capacity: int,
    choose: Callable[[int, Bins], tuple[tuple[int, int], ...]],
) -> Iterator[Bins]:
    """Yields every bin with the rows that ``choose`` adds, which are removed from ``left``; equal bins are handled together."""
    for kind in bins:
        room = capacity - sum(length * count for length, count in kind.content)
        times = kind.times
        while times:
            more = choose(room, kind)
            served = min([times, *(left[length] // count for length, count in more)])
            for length, count in more:
                left[length] -= count * served
            yield Bins((*kind.content, *more), served if more else times)
            times = times - served if more else 0


def _largest(lengths: list[int], left: Mapping[int, int], room: int) -> int:
    """The largest of the decreasing ``lengths`` that fits and is left; 0 if there is none."""
    return next((length for length in lengths if length <= room and left[length]), 0)


def _greedy(lengths: list[int], left: Mapping[int, int], room: int) -> tuple[tuple[int, int], ...]:
    """As many rows as fit of each length that is left, the largest first."""
    content = []
    for length in lengths:
        count = min(room // length, left[length])
        if count:
            content.append((length, count))
            room -= length * count
    return tuple(content)


ALGORITHMS: dict[str, Callable[[Counts, int], list[Bins]]] = {
    "best_fit_decreasing": best_fit_decreasing,
    "modified_first_fit_decreasing": modified_first_fit_decreasing,
}
"""Name in the configuration -> algorithm."""
