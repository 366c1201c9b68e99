"""From tokenised rows to optimizer steps: order, packing, micro-batches, and the share of each rank.

Everything is a pure function of (seed, epoch, step). A stream that is told a position continues there, on any number of
ranks, and every rank can count the whole step without asking the others. Nothing here knows text, models or processes.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.data.batch import IGNORE, Batch, GlobalBatch
from limbeck.data.tokenize import Examples
from limbeck.errors import LimbeckError

Ints = NDArray[np.int64]


class _Unit(NamedTuple):
    """What becomes one row of a batch: one row of the examples, or with packing several that share a sequence."""

    rows: Ints
    length: int
    supervised: int


@dataclass(frozen=True)
class _Epoch:
    """The units of one epoch in their order: unit i holds the rows ``rows[starts[i] : starts[i + 1]]``."""

    rows: Ints
    starts: Ints

    def units(self, examples: Examples, first: int, last: int) -> list[_Unit]:
        starts = self.starts[first : last + 1]
        rows = self.rows[starts[0] : starts[-1]]
        lengths = np.add.reduceat(examples.lengths[rows], starts[:-1] - starts[0])
        supervised = np.add.reduceat(examples.num_supervised[rows], starts[:-1] - starts[0])
        members = np.split(rows, starts[1:-1] - starts[0])
        return [_Unit(*unit) for unit in zip(members, lengths.tolist(), supervised.tolist(), strict=True)]


class BatchStream:
    """Endless optimizer steps over ``examples``, epoch after epoch, as this rank sees them.

    One step takes the next ``per_device_batch_size * accumulation_steps * world_size`` rows (packs, with ``packing``)
    in an order that depends on (seed, epoch) only. Those left over at the end of an epoch are skipped; the next epoch's
    order gives others that place.

    sequence_length:            tokens that a pack may hold.
    max_tokens_per_microbatch:  0, or the most slots (rows x padded length) of a micro-batch: the step's rows are
                                then grouped by length instead of by ``per_device_batch_size``.
    length_round:               padded lengths are multiples of this, up to ``sequence_length`` or the longest row.
    pad_id:                     the token id in padding; never predicted.

    Raises LimbeckError if the data holds less than one step, or a row exceeds ``max_tokens_per_microbatch``.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        seed: int,
        sequence_length: int,
        per_device_batch_size: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
        packing: bool,
        max_tokens_per_microbatch: int,
        length_round: int,
        pad_id: int,
        shuffle: bool = True,
    ) -> None:
        self._examples = examples
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._per_device = per_device_batch_size
        self._budget = max_tokens_per_microbatch
        self._shuffle = shuffle
        self._units_per_step = per_device_batch_size * accumulation_steps * world_size
        limit = max(sequence_length, int(examples.lengths.max()))
        self._layout = _Layout(length_round, limit, pad_id, packing)
        self._pack_of = _pack(np.sort(examples.lengths)[::-1], limit) if packing else None
        units = len(examples) if self._pack_of is None else int(self._pack_of.max()) + 1
        self._steps_per_epoch = units // self._units_per_step
        if not self._steps_per_epoch:
            raise LimbeckError(
                f"The data gives {units} {'packs' if packing else 'rows'}, fewer than one step takes: "
                f"{self._units_per_step} = per_device_train_batch_size {per_device_batch_size} x "
                f"gradient_accumulation_steps {accumulation_steps} x {world_size} ranks; lower "
                "gradient_accumulation_steps or per_device_train_batch_size, or give more data."
            )
        self._checksum = zlib.crc32(examples.labels.tobytes(), zlib.crc32(examples.tokens.tobytes()))
        self._epoch = 0
        self._step = 0
        self._order = self._order_of(0)
        if self._budget:
            self._check_budget()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the same in every epoch."""
        return self._steps_per_epoch

    @property
    def position(self) -> dict[str, int]:
        """Where the next step is, and what that depends on: plain numbers for a checkpoint."""
        return {"epoch": self._epoch, "step": self._step, **self._identity()}

    def seek(self, position: Mapping[str, int]) -> None:
        """Continue at a ``position`` of a stream with the same data, seed and rows per step, on any number of ranks."""
        for name, ours in self._identity().items():
            if position[name] != ours:
                raise LimbeckError(
                    f"The checkpoint's place in the data was counted with {name} = {position[name]}, and this run has "
                    f"{ours}; use the same data, seed, sequence settings and per_device_train_batch_size x "
                    "gradient_accumulation_steps x ranks, or start a new run from the checkpoint's weights."
                )
        self._step = position["step"]
        if position["epoch"] != self._epoch:
            self._epoch = position["epoch"]
            self._order = self._order_of(self._epoch)

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self

    def __next__(self) -> GlobalBatch:
        first = self._step * self._units_per_step
        units = self._order.units(self._examples, first, first + self._units_per_step)
        units.sort(key=lambda unit: -unit.length)
        self._advance()
        return _global_batch(self._examples, self._micro_batches(units), self._layout, self._rank, self._world_size)

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self._seed,
            "rows": len(self._examples),
            "rows_per_step": self._units_per_step,
            "steps_per_epoch": self._steps_per_epoch,
            "checksum": self._checksum,
        }

    def _advance(self) -> None:
        self._step += 1
        if self._step == self._steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> _Epoch:
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._examples)) if self._shuffle else np.arange(len(self._examples))
        if self._pack_of is None:
            return _Epoch(order, np.arange(len(order) + 1))
        # Which lengths share a pack is the same in every epoch; which rows have their turn as those lengths is not.
        by_length = order[np.argsort(-self._examples.lengths[order], kind="stable")]
        packs = int(self._pack_of.max()) + 1
        place = random.permutation(packs) if self._shuffle else np.arange(packs)
        place_of = place[self._pack_of]
        starts = np.concatenate(([0], np.cumsum(np.bincount(place_of))))
        return _Epoch(by_length[np.argsort(place_of, kind="stable")], starts)

    def _micro_batches(self, units: list[_Unit]) -> list[list[_Unit]]:
        """The step's units, which come sorted by falling length, as the micro-batches of all ranks."""
        if not self._budget:
            return [units[i : i + self._per_device] for i in range(0, len(units), self._per_device)]
        groups = []
        while units:
            fit = self._budget // self._layout.padded(units[0].length)
            groups.append(units[:fit])
            units = units[fit:]
        # Every rank needs equally many. Halving always gets there: the units of a step are a multiple of the ranks.
        while len(groups) % self._world_size:
            i = max(range(len(groups)), key=lambda i: (len(groups[i]) > 1) * len(groups[i]) * groups[i][0].length)
            half = len(groups[i]) // 2
            groups[i : i + 1] = [groups[i][:half], groups[i][half:]]
        return groups

    def _check_budget(self) -> None:
        longest = int(np.add.reduceat(self._examples.lengths[self._order.rows], self._order.starts[:-1]).max())
        slots = self._layout.padded(longest)
        if slots > self._budget:
            kind = "row" if self._pack_of is None else "pack"
            raise LimbeckError(
                f"The longest {kind} has {longest} tokens ({slots} with padding), "
                f"more than max_tokens_per_microbatch_in_train = {self._budget}; raise that to {slots} or more, "
                "or lower sequence_length."
            )


def fixed_batches(
    examples: Examples, *, batch_size: int, rank: int, world_size: int, pad_id: int, length_round: int
) -> list[GlobalBatch]:
    """All rows once, in an order that never changes, for validation; each batch has one micro-batch per rank.

    Rows of similar length share a batch. The last rows are spread evenly over the ranks; a rank that gets none has a
    micro-batch whose labels are all ``IGNORE``.
    """
    layout = _Layout(length_round, int(examples.lengths.max()), pad_id, packed=False)
    order = np.argsort(-examples.lengths, kind="stable")
    units = _Epoch(order, np.arange(len(order) + 1)).units(examples, 0, len(order))
    batches = []
    for first in range(0, len(units), batch_size * world_size):
        step = units[first : first + batch_size * world_size]
        bounds = [len(step) * place // world_size for place in range(world_size + 1)]
        groups = [step[start:stop] for start, stop in pairwise(bounds)]
        batches.append(_global_batch(examples, groups, layout, rank, world_size))
    return batches


@dataclass(frozen=True)
class _Layout:
    """How sequences are laid into a micro-batch."""

    length_round: int
    limit: int
    pad_id: int
    packed: bool

    def padded(self, length: int) -> int:
        return min(-(-length // self.length_round) * self.length_round, self.limit)


def _global_batch(
    examples: Examples, micro_batches: Sequence[Sequence[_Unit]], layout: _Layout, rank: int, world_size: int
) -> GlobalBatch:
    """Deal the ``micro_batches`` of all ranks, largest first, keep this rank's, and count them all.

    Dealt in snakes (0 1 2, 2 1 0, ...), the ranks meet micro-batches of similar size in every round.
    """
    units = [unit for group in micro_batches for unit in group]
    slots = 0
    mine = []
    for i, group in enumerate(micro_batches):
        shape = (max(1, len(group)), layout.padded(max((unit.length for unit in group), default=1)))
        slots += shape[0] * shape[1]
        turn, place = divmod(i, world_size)
        if rank == (place if turn % 2 == 0 else world_size - 1 - place):
            mine.append(_collate(examples, group, shape, layout))
    return GlobalBatch(
        micro_batches=tuple(mine),
        num_supervised=sum(unit.supervised for unit in units),
        normalizer=float(sum(unit.supervised for unit in units)),
        num_tokens=sum(unit.length for unit in units),
        num_slots=slots,
    )


def _collate(examples: Examples, group: Sequence[_Unit], shape: tuple[int, int], layout: _Layout) -> Batch:
    """One micro-batch; with no unit at all, a row of padding that teaches nothing."""
    input_ids = np.full(shape, layout.pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    # Padding counts on from the last document, so that it does not look like the beginning of another.
    position_ids = np.tile(np.arange(shape[1]), (shape[0], 1))
    is_real = np.zeros(shape, dtype=bool)
    for i, unit in enumerate(group):
        end = 0
        for row in unit.rows:
            tokens, targets = examples.row(row)
            here = slice(end, end + len(tokens))
            input_ids[i, here], labels[i, here] = tokens, targets
            position_ids[i, end:] = np.arange(shape[1] - end)
            end += len(tokens)
        is_real[i, :end] = True
    return Batch.of(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids) if layout.packed else None,
        num_tokens=sum(unit.length for unit in group),
        real=None if is_real.all() else torch.from_numpy(np.flatnonzero(is_real)),
    )


def _pack(lengths: Ints, capacity: int) -> Ints:
    """Best-fit decreasing: for ``lengths`` in falling order, the number of the pack [rows] that each one goes to.

    The packs depend on nothing but the lengths, so every epoch has equally many.
    """
    pack_of = np.empty(len(lengths), dtype=np.int64)
    open_packs: defaultdict[int, list[int]] = defaultdict(list)  # free tokens -> packs
    free: list[int] = []  # the keys of open_packs that have a pack, sorted
    packs = 0
    for i, length in enumerate(lengths.tolist()):
        fit = bisect_left(free, length)
        if fit == len(free):
            room, pack, packs = capacity, packs, packs + 1
        else:
            room = free[fit]
            pack = open_packs[room].pop()
            if not open_packs[room]:
                del free[fit]
        pack_of[i] = pack
        left = room - length
        if left:
            if not open_packs[left]:
                insort(free, left)
            open_packs[left].append(pack)
    return pack_of
