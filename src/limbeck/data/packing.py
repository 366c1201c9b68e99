"""Which rows share a sequence: bin packing by tokens.

Rows of one length are alike, so bins are filled by kinds (a pattern of lengths, so many times) and never row by row; the
cost depends on the lengths that occur, hardly on the number of rows. Nothing here knows order, epochs or batches.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Counts = list[tuple[int, int]]  # (length, how many rows have it), by falling length


class Bins(NamedTuple):
    """``times`` bins that each hold the same: so many rows of each length."""

    content: tuple[tuple[int, int], ...]
    times: int


class Packs(NamedTuple):
    """Pack i holds the rows ``members[starts[i] : starts[i + 1]]``, counted in the order of falling length."""

    members: Ints
    starts: Ints


def pack(lengths: Ints, capacity: int, algorithm: str) -> Packs:
    """Packs of at most ``capacity`` tokens for rows whose ``lengths`` come in falling order, none above ``capacity``.

    algorithm: a name in ``ALGORITHMS``. Depends on nothing but the lengths, so that every epoch has equally many packs.
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
    """Longest first, each row into the fullest bin that still has room for it."""
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
            # After one row the bin is fuller than any other that has room for the next of this length: it goes there too.
            each = min(room // length, count)
            times = min(kind.times, count // each)
            put(room - each * length, Bins((*kind.content, (length, each)), times))
            count -= each * times
            if kind.content and kind.times > times:
                put(room, Bins(kind.content, kind.times - times))
    return [bins for level in open_bins.values() for bins in level]


def modified_first_fit_decreasing(counts: Counts, capacity: int) -> list[Bins]:
    """Johnson and Garey's (1985): first-fit decreasing that finds partners for the large rows first.

    A row is large above a half of the capacity, medium above a third, small above a sixth. Every large row has a bin; these
    get a medium row each where one fits, those without one get two small rows, backwards; then first-fit decreasing.
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
    """Every bin in order with what ``choose`` adds to it, taken out of ``left``; alike bins are served together."""
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
    """The largest of ``lengths``, which fall, that fits and is left; 0 if there is none."""
    return next((length for length in lengths if length <= room and left[length]), 0)


def _greedy(lengths: list[int], left: Mapping[int, int], room: int) -> tuple[tuple[int, int], ...]:
    """As many as fit of each length that is left, the largest first."""
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
"""By the name in the configuration."""
