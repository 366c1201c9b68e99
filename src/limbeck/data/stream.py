"""Makes optimizer steps of tokenised rows: their order, the micro-batches, and the micro-batches of each rank.

Everything is a pure function of (seed, epoch, step), so a stream continues exactly from a saved position on any number of
ranks. Examples may be memory-mapped files larger than memory: only the rows of a step are read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.data.batch import Batch, StepBatch
from limbeck.data.concatenated import Parts
from limbeck.data.examples import Examples
from limbeck.data.masks import IGNORE
from limbeck.data.packing import Packs, pack
from limbeck.data.partition import partition_balanced, partition_neighbours_within_budget, partition_within_budget
from limbeck.data.teacher_prompts import teacher_view
from limbeck.errors import LimbeckError

Ints = NDArray[np.integer[Any]]
RowsOfEpoch = Callable[[int], Ints]

_WINDOW = 32  # steps that group_by_length sorts together: enough for similar lengths, few enough to stay shuffled
_BLOCK, _BLOCKS = 1 << 16, 256  # bytes per block, and blocks per array, that a checksum reads


@dataclass(frozen=True)
class _Epoch:
    """The units of one epoch in order. A unit is one row or, with packing, the rows of one pack.

    rows:  row numbers in order; with ``packs``, sorted by decreasing length.
    packs: which of ``rows`` share a pack; None without packing.
    order: the order of the packs; None without packing.
    """

    rows: Ints
    packs: Packs | None
    order: Ints | None

    def __len__(self) -> int:
        return len(self.rows) if self.packs is None else len(self.packs.starts) - 1

    def units(self, first: int, last: int) -> list[Ints]:
        """Returns the row numbers of each unit in ``[first, last)``."""
        if self.packs is None or self.order is None:
            return list(self.rows[first:last, None])
        members, starts = self.packs
        return [self.rows[members[starts[i] : starts[i + 1]]] for i in self.order[first:last]]

    def checksum(self) -> int:
        """A checksum that differs for another mixture, shuffle or packing."""
        found = 0
        for array in (self.rows, self.order, *(self.packs or ())):
            if array is not None:
                found = zlib.crc32(np.ascontiguousarray(array).data, found)
        return found


@dataclass(frozen=True)
class StreamSettings:
    """How rows become optimizer steps.

    seed:                       of the order of the rows.
    sequence_length:            maximum number of tokens in a pack.
    per_device_batch_size:      rows of a micro-batch; with ``packing``, packs.
    accumulation_steps:         micro-batches of a rank in a step.
    packing:                    concatenate the rows of a micro-batch instead of padding them.
    packing_algorithm:          which rows share a pack: a name in ``packing.ALGORITHMS``.
    max_tokens_per_microbatch:  maximum number of slots of a micro-batch (rows x padded length; with packing, tokens). The
                                rows of a step are then grouped by length, not by ``per_device_batch_size``. 0 for no limit.
    length_round:               padded lengths are multiples of this, up to ``sequence_length`` or the longest row; with
                                packing, the length of the whole micro-batch.
    group_by_length:            without packing, a step takes rows of similar length, which need little padding.
    pad_id:                     token id of padding; never a target.
    shuffle:                    False keeps the order of the rows.
    rows_of_epoch:              function from the epoch to its row numbers, which may repeat; all rows by default.
    """

    sequence_length: int
    per_device_batch_size: int
    pad_id: int
    seed: int = 0
    accumulation_steps: int = 1
    packing: bool = False
    packing_algorithm: str = "best_fit_decreasing"
    max_tokens_per_microbatch: int = 0
    length_round: int = 4
    group_by_length: bool = False
    shuffle: bool = True
    rows_of_epoch: RowsOfEpoch | None = None


class BatchStream:
    """An endless iterator over the optimizer steps of one rank, epoch after epoch.

    One step takes the next ``per_device_batch_size * accumulation_steps * world_size`` rows (packs, with ``packing``) in an
    order that depends only on (seed, epoch). Rows left over at the end of an epoch are skipped; in the next epoch's order
    these are other rows.

    Raises LimbeckError if an epoch has fewer rows than one step, or a row exceeds ``max_tokens_per_microbatch``.
    """

    def __init__(self, examples: Examples, settings: StreamSettings, rank: int = 0, world_size: int = 1) -> None:
        self._examples = examples
        self._settings = settings
        self._rank = rank
        self._world_size = world_size
        self._budget = settings.max_tokens_per_microbatch
        self._algorithm = settings.packing_algorithm if settings.packing else None
        self._units_per_step = settings.per_device_batch_size * settings.accumulation_steps * world_size
        self._capacity = max(settings.sequence_length, int(examples.lengths.max()))
        self._layout = _Layout(settings.length_round, self._capacity, settings.pad_id, settings.packing)
        self._packs: Packs | None = None  # of all rows; not kept if the rows differ between epochs
        if self._budget:
            self._check_budget()
        self._checksum = _checksum(examples)
        self._epoch = self._step = 0
        first = self._order_of(0)
        self._order: _Epoch | None = first  # None until a step needs it
        self._steps_per_epoch = len(first) // self._units_per_step
        self._rows_per_epoch = len(first.rows)
        self._order_checksum = first.checksum()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in the first epoch; the same in every epoch unless ``rows_of_epoch`` changes it."""
        return self._steps_per_epoch

    @property
    def position(self) -> dict[str, int]:
        """The position of the next step and what it depends on, as JSON values for a checkpoint."""
        return {"epoch": self._epoch, "step": self._step, **self._identity()}

    def seek(self, position: Mapping[str, int]) -> None:
        """Continues at ``position``, also on another number of ranks.

        Raises LimbeckError if the position belongs to other data, another mixture, packing or seed, or other rows per step.
        """
        for name, ours in self._identity().items():
            if position.get(name) != ours:
                raise LimbeckError(
                    f"The checkpoint's position in the data was counted with {name} = {position.get(name)}, and this run has "
                    f"{ours}; use the same data, mixture, packing, seed, sequence settings and "
                    "per_device_train_batch_size x gradient_accumulation_steps x ranks, or start a new run from the "
                    "checkpoint's weights."
                )
        if position["epoch"] != self._epoch:
            self._order = None
        self._epoch, self._step = position["epoch"], position["step"]

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        groups = _micro_batches(self._examples, self.take(), self._settings, self._layout, self._world_size)
        return _rank_batch(self._examples, groups, self._layout, self._rank, self._world_size)

    def take(self) -> list[Ints]:
        """The row numbers of each unit (row or pack) of the next step, of all ranks; the position moves on."""
        if self._order is None:
            self._order = self._order_of(self._epoch)
        first = self._step * self._units_per_step
        units = self._order.units(first, first + self._units_per_step)
        self._step += 1
        if (self._step + 1) * self._units_per_step > len(self._order):
            self._epoch, self._step, self._order = self._epoch + 1, 0, None
        return units

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self._settings.seed,
            "rows": self._rows_per_epoch,
            "rows_per_step": self._units_per_step,
            "steps_per_epoch": self._steps_per_epoch,
            "checksum": self._checksum,
            "order": self._order_checksum,
        }

    def _order_of(self, epoch: int) -> _Epoch:
        random = np.random.default_rng((self._settings.seed, epoch))
        every = len(self._examples)
        small = np.int32 if every < 2**31 else np.int64  # saves half the memory for large datasets
        rows = (
            np.arange(every, dtype=small)
            if self._settings.rows_of_epoch is None
            else np.array(self._settings.rows_of_epoch(epoch))
        )
        if self._settings.shuffle:
            random.shuffle(rows)
        if self._settings.group_by_length and not self._settings.packing:
            rows = _by_length(rows, self._examples.lengths, self._units_per_step, random)
        order = _Epoch(rows, None, None)
        if self._algorithm is not None:
            # Which lengths share a pack is the same in every epoch; which rows of these lengths, is not.
            lengths = self._examples.lengths[rows]
            rows = rows[np.argsort(_sortable(self._capacity - lengths, self._capacity), kind="stable")]
            packs = self._packs or pack(self._examples.lengths[rows], self._capacity, self._algorithm)
            if self._settings.rows_of_epoch is None:
                self._packs = packs
            numbers = np.arange(len(packs.starts) - 1)
            if self._settings.shuffle:
                random.shuffle(numbers)
            order = _Epoch(rows, packs, numbers)
        if len(order) < self._units_per_step:
            raise LimbeckError(
                f"The data has {len(order)} {'rows' if order.packs is None else 'packs'}, fewer than one step takes: "
                f"{self._units_per_step} = per_device_train_batch_size {self._settings.per_device_batch_size} x "
                f"gradient_accumulation_steps {self._settings.accumulation_steps} x {self._world_size} ranks; lower "
                "gradient_accumulation_steps or per_device_train_batch_size, or add data."
            )
        return order

    def _check_budget(self) -> None:
        longest = int(self._examples.lengths.max())
        slots = self._layout.shape([longest])[1]
        if slots > self._budget:
            raise LimbeckError(
                f"The longest row has {longest} tokens ({slots} with padding), "
                f"more than max_tokens_per_microbatch_in_train = {self._budget}; raise that to {slots} or more, "
                "or lower sequence_length."
            )


def make_step(examples: Examples, settings: StreamSettings, rank: int = 0, world_size: int = 1) -> StepBatch:
    """One optimizer step of all rows of ``examples``: this rank's micro-batches, as ``BatchStream`` makes them.

    Without a limit of tokens per micro-batch there must be ``per_device_batch_size * accumulation_steps * world_size`` rows.
    """
    capacity = max(settings.sequence_length, int(examples.lengths.max()))
    layout = _Layout(settings.length_round, capacity, settings.pad_id, settings.packing)
    units = [np.array([row]) for row in range(len(examples))]
    groups = _micro_batches(examples, units, settings, layout, world_size)
    return _rank_batch(examples, groups, layout, rank, world_size)


def fixed_batches(
    examples: Examples,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    pad_id: int,
    length_round: int,
    rows: Ints | None = None,
) -> list[StepBatch]:
    """Returns validation batches with every one of ``rows`` once, in a fixed order; each has one micro-batch per rank.

    rows: row numbers; all rows by default.

    Rows of similar length share a batch. The rows of the last batch are distributed evenly over the ranks; a rank without
    rows gets a micro-batch whose labels are all ``IGNORE``.
    """
    layout = _Layout(length_round, int(examples.lengths.max()), pad_id, packed=False)
    rows = np.arange(len(examples)) if rows is None else rows
    units = list(rows[np.argsort(-examples.lengths[rows], kind="stable")][:, None])
    batches = []
    for first in range(0, len(units), batch_size * world_size):
        step = units[first : first + batch_size * world_size]
        bounds = [len(step) * i // world_size for i in range(world_size + 1)]
        groups = [step[start:stop] for start, stop in pairwise(bounds)]
        batches.append(_rank_batch(examples, groups, layout, rank, world_size))
    return batches


@dataclass(frozen=True)
class _Layout:
    """How a micro-batch holds sequences: one per row, or all concatenated in one row."""

    length_round: int
    limit: int
    pad_id: int
    packed: bool

    def padded(self, length: int) -> int:
        return min(self.rounded(length), self.limit)

    def rounded(self, length: int) -> int:
        return -(-length // self.length_round) * self.length_round

    def whole(self, budget: int) -> int:
        """The largest number of tokens whose rounded length is at most ``budget``."""
        return budget // self.length_round * self.length_round

    def shape(self, units: Sequence[int]) -> tuple[int, int]:
        """[rows, slots] of a micro-batch of units with these lengths."""
        if self.packed:
            return 1, self.rounded(max(1, sum(units)))
        return max(1, len(units)), self.padded(max(units, default=1))


def _micro_batches(
    examples: Examples, units: list[Ints], settings: StreamSettings, layout: _Layout, world_size: int
) -> list[list[Ints]]:
    """Groups the step's units into the micro-batches of all ranks, largest first; the same number for each rank."""
    if settings.max_tokens_per_microbatch and layout.packed:  # rows are concatenated, so a pack may be split
        units = [unit[i : i + 1] for unit in units for i in range(len(unit))]
    lengths = [int(examples.lengths[unit].sum()) for unit in units]
    if not layout.packed:
        if settings.max_tokens_per_microbatch:
            groups = partition_neighbours_within_budget(
                lengths, settings.max_tokens_per_microbatch, world_size, layout.padded
            )
        else:  # similar lengths need little padding
            order = sorted(range(len(units)), key=lambda i: -lengths[i])
            groups = [
                order[i : i + settings.per_device_batch_size]
                for i in range(0, len(units), settings.per_device_batch_size)
            ]
    else:
        if settings.max_tokens_per_microbatch:
            groups = partition_within_budget(lengths, layout.whole(settings.max_tokens_per_microbatch), world_size)
        else:
            groups = partition_balanced(
                lengths,
                settings.accumulation_steps * world_size,
                most=settings.per_device_batch_size,
            )
        groups.sort(key=lambda group: -sum(lengths[i] for i in group))
    return [[units[i] for i in group] for group in groups]


def _rank_batch(
    examples: Examples, micro_batches: Sequence[Sequence[Ints]], layout: _Layout, rank: int, world_size: int
) -> StepBatch:
    """Assigns the ``micro_batches`` of all ranks, largest first, and collates those of ``rank``.

    Every rank gets the same number of micro-batches and nearly the same number of tokens, its largest micro-batch first.
    """
    lengths = [[int(examples.lengths[unit].sum()) for unit in group] for group in micro_batches]
    assigned = partition_balanced([sum(of_group) for of_group in lengths], world_size, len(micro_batches) // world_size)
    batches = [_collate(examples, micro_batches[i], layout.shape(lengths[i]), layout) for i in assigned[rank]]
    if examples.teacher_prompts is not None:
        batches = [
            replace(batch, teacher_batch=_collate_for_teacher(examples, micro_batches[i], layout))
            for batch, i in zip(batches, assigned[rank], strict=True)
        ]
    return StepBatch.of(batches)


def _collate_for_teacher(examples: Examples, group: Sequence[Ints], layout: _Layout) -> Batch:
    """Makes the same micro-batch as the teacher reads it: its rows have other lengths and are in the same order."""
    view = teacher_view(examples, [int(row) for unit in group for row in unit])
    units = list(np.arange(len(view))[:, None])
    layout = replace(layout, limit=int(view.lengths.max(initial=1)))
    return _collate(view, units, layout.shape(view.lengths.tolist()), layout)


def _collate(examples: Examples, group: Sequence[Ints], shape: tuple[int, int], layout: _Layout) -> Batch:
    """Makes one micro-batch; without units, a row of padding and ``IGNORE``."""
    input_ids = np.full(shape, layout.pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    objectives = None if examples.objectives is None else np.zeros(shape, dtype=np.int8)
    given = {"weights": examples.weights, "sampled_log_probs": examples.sampled_log_probs}
    given["advantages"] = examples.advantages
    values = {name: np.zeros(shape, np.float32) for name, array in given.items() if array is not None}
    is_real = np.zeros(shape, dtype=bool)
    rows = [row for unit in group for row in unit]
    slot, end, documents = 0, 0, []
    for row in rows:
        source = slice(examples.offsets[row], examples.offsets[row + 1])
        length = int(source.stop - source.start)
        here = slice(end, end + length)
        input_ids[slot, here], labels[slot, here] = examples.tokens[source], examples.labels[source]
        is_real[slot, here] = True
        for name, array in values.items():
            array[slot, here] = given[name][source]  # type: ignore[index]
        if objectives is not None and examples.objectives is not None:
            objectives[slot, here] = examples.objectives[row]
        if layout.packed:
            documents.append(length)
            end += length
        else:
            slot += 1
    position_ids = None
    if layout.packed:
        # Padding continues the positions of the last document, so that it does not start a new one.
        documents = [*documents[:-1], shape[1] - sum(documents[:-1])]
        starts = np.cumsum([0, *documents[:-1]])
        position_ids = torch.from_numpy(np.arange(shape[1]) - np.repeat(starts, documents))[None]
    return Batch.of(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=position_ids,
        num_tokens=sum(int(examples.lengths[unit].sum()) for unit in group),
        real=None if is_real.all() else torch.from_numpy(np.flatnonzero(is_real)),
        documents=tuple(documents) if layout.packed else None,
        row_ids=tuple(int(row if examples.row_ids is None else examples.row_ids[row]) for row in rows),
        objectives=None if objectives is None else torch.from_numpy(objectives),
        **{name: torch.from_numpy(array) for name, array in values.items()},
    )


def _by_length(rows: Ints, lengths: Ints, per_step: int, random: np.random.Generator) -> Ints:
    """Sorts the rows of every ``_WINDOW`` steps by length and shuffles these steps.

    Rows after the last whole step keep their positions, so that no length is skipped more often than another.
    """
    parts = []
    whole = len(rows) // per_step * per_step
    for start in range(0, whole, per_step * _WINDOW):
        window = rows[start : min(start + per_step * _WINDOW, whole)]
        steps = window[np.argsort(lengths[window], kind="stable")].reshape(-1, per_step)
        parts.append(random.permutation(steps).ravel())
    return np.concatenate([*parts, rows[whole:]])


def _sortable(values: Ints, most: int) -> Ints:
    """Casts to 16 bits if that is lossless, because numpy sorts 16-bit integers in linear time."""
    return values.astype(np.uint16) if most < 2**16 else values


def _checksum(examples: Examples) -> int:
    """A checksum of the data. Of large arrays it reads evenly spaced blocks, so that mapped files stay on disk."""
    found = 0
    arrays: list[Any] = [examples.offsets, examples.tokens, examples.labels]
    arrays += [array for array in (examples.weights, examples.teacher_prompts) if array is not None]
    for array in (part for one in arrays for part in (one.parts if isinstance(one, Parts) else (one,))):
        contiguous: Any = np.ascontiguousarray(
            array
        )  # does not copy an array that is contiguous already, mapped or not
        data = memoryview(contiguous).cast("B")
        step = _BLOCK * max(1, len(data) // (_BLOCK * _BLOCKS))
        for start in range(0, len(data), step):
            found = zlib.crc32(data[start : start + _BLOCK], found)
        found = zlib.crc32(len(data).to_bytes(8, "little"), found)
    return found
