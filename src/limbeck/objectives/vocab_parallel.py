"""Reductions over a vocabulary that one rank holds whole (``VocabReducer``) or in slices (``VocabParallel``).

Shapes: n rows, V columns held here, k columns of the whole vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.errors import LimbeckError


class VocabReducer:
    """Reductions over the vocabulary, for a rank that holds all of it."""

    def width(self, x: Tensor) -> int:
        """Return the size of the whole vocabulary, of which x [n, V] is the part held here."""
        return x.shape[-1]

    def sum(self, x: Tensor) -> Tensor:
        """Sum x [n, m] over all ranks."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """Take the maximum of x [n, m] over all ranks."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the slices x [..., V] of all ranks, padded with zeros to equal widths."""
        return x

    def topk(self, k: int, *rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, for each of ``rows`` [n, V], the k largest entries of the whole rows and their columns, both [n, k]."""
        return [tuple(x.topk(min(k, x.shape[-1]), dim=-1)) for x in rows]  # type: ignore[misc]

    def gather_local(self, x: Tensor, columns: Tensor) -> Tensor:
        """Return the entries [n, k] of x [n, V] at ``columns`` [n, k]; 0 for columns that are not held here."""
        return x.gather(-1, columns)

    def gather(self, x: Tensor, columns: Tensor) -> Tensor:
        """Return the entries [n, k] of the whole rows at ``columns`` [n, k]."""
        return self.sum(self.gather_local(x, columns))

    def scatter_add_(self, x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        """Add values [n, k] to x [n, V] in place, where the columns are held here. Returns x."""
        return x.scatter_add_(-1, columns, values)


NO_SHARDING = VocabReducer()


class VocabParallel(VocabReducer):
    """Reductions over a vocabulary that is split over the ranks of ``group``. Every method is a collective.

    This rank holds the columns [start, start + size) of ``vocab_size``; ``head.weight[parallel.columns]`` is its part of a
    head. The slices are as even as possible, larger ones first. With ``head_rows``, the number of rows of a head that may be
    padded beyond the vocabulary, the slices are those of DTensor: equal parts of the head, of which the last may be smaller.

    A chunk of the loss takes at most five collectives of a few numbers per row. Top-k gathers 4 k numbers, adaptive_kl all
    probabilities. The gradient of the hidden states is summed once at the end.

    Raises LimbeckError if a rank would hold no token, or if ``head_rows`` is less than ``vocab_size``.
    """

    def __init__(self, vocab_size: int, group: dist.ProcessGroup | None = None, head_rows: int | None = None) -> None:
        self._group = group
        self._ranks = dist.get_world_size(group)
        if vocab_size < self._ranks:
            raise LimbeckError(f"a vocabulary of {vocab_size} cannot be split over {self._ranks} ranks.")
        rank, least, more = dist.get_rank(group), *divmod(vocab_size, self._ranks)
        self.vocab_size = vocab_size
        self.start = rank * least + min(rank, more)
        self.size = least + (rank < more)
        self._padded_width = self._max_rows = -(-vocab_size // self._ranks)
        if head_rows is not None:
            if head_rows < vocab_size:
                raise LimbeckError(
                    f"head_rows={head_rows} is less than the vocabulary of {vocab_size}; it counts all rows of the head."
                )
            each = -(-head_rows // self._ranks)
            if each * (self._ranks - 1) >= vocab_size:
                raise LimbeckError(
                    f"an output head of {head_rows} rows cannot be split over {self._ranks} ranks: the last would hold nothing "
                    f"of the {vocab_size} tokens."
                )
            self._max_rows = each
            self.start, self._padded_width = rank * each, min(each, vocab_size)
            self.size = min(each, vocab_size - self.start)

    def check(self, vocab_size: int | None, **columns: int | None) -> None:
        """Raise LimbeckError unless each role gives this rank's columns, with or without padding rows of the head."""
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise LimbeckError(
                f"vocab_size={vocab_size} contradicts the {self.vocab_size} of VocabParallel; leave it out."
            )
        for role, count in columns.items():
            if count is not None and self._ranks > 1 and not self.size <= count <= self._max_rows:
                raise LimbeckError(
                    f"the {role} gives {count} columns, and this rank holds {self.size} of {self.vocab_size}; give "
                    "head.weight[parallel.columns], or logits[:, parallel.columns]."
                )

    @property
    def columns(self) -> slice:
        """The columns that this rank holds."""
        return slice(self.start, self.start + self.size)

    def width(self, x: Tensor) -> int:
        return self.vocab_size

    def sum(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)  # the caller may still use its tensor
        dist.all_reduce(x, group=self._group)
        return x

    def max(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self._group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._gather(torch.nn.functional.pad(x, (0, self._padded_width - x.shape[-1]))), -1)

    def topk(self, k: int, *rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        k = min(k, self.vocab_size)
        local = []
        for x in rows:
            values, columns = x.topk(min(k, x.shape[-1]), dim=-1)
            missing = (0, k - values.shape[-1])
            local += [
                torch.nn.functional.pad(values.double(), missing, value=-torch.inf),
                torch.nn.functional.pad((columns + self.start).double(), missing),  # exact: below 2⁵³
            ]
        gathered = torch.stack(self._gather(torch.stack(local)))  # [ranks, 2 · rows, n, k]
        largest = []
        for i, x in enumerate(rows):
            values, columns = (gathered[:, 2 * i + j].movedim(0, 1).flatten(1) for j in (0, 1))
            top = values.topk(k, dim=-1)
            largest.append((top.values.to(x.dtype), columns.gather(-1, top.indices).long()))
        return largest

    def gather_local(self, x: Tensor, columns: Tensor) -> Tensor:
        here, local = self._local(columns)
        return torch.where(here, x.gather(-1, local), 0.0)

    def scatter_add_(self, x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        here, local = self._local(columns)
        return x.scatter_add_(-1, local, torch.where(here, values, 0.0))

    def _local(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        local = columns - self.start
        return (local >= 0) & (local < self.size), local.clamp(0, self.size - 1)

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self._ranks)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return parts


def take_rows(shard: Tensor, start: int, rows: slice, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the rows ``rows`` of a matrix that is split over the ranks of ``group``. A collective.

    shard: [count, ...], the rows [start, start + len(shard)) of the matrix, held by this rank. It may be empty, and so may
    ``rows``. Brings a teacher's head, split over one number of ranks, to the slices of the student's ranks. Raises
    LimbeckError if no rank holds a requested row.
    """
    taken = torch.empty(rows.stop - rows.start, *shard.shape[1:], dtype=shard.dtype, device=shard.device)
    found = 0
    for rank in range(dist.get_world_size(group)):
        owner = dist.get_global_rank(group, rank) if group is not None else rank
        extent = torch.tensor([start, len(shard)], device=shard.device)
        dist.broadcast(extent, owner, group=group)
        first, count = extent.tolist()
        held = shard.contiguous() if dist.get_rank(group) == rank else shard.new_empty(count, *shard.shape[1:])
        if count:
            dist.broadcast(held, owner, group=group)
        low, high = max(first, rows.start), min(first + count, rows.stop)
        if low < high:
            taken[low - rows.start : high - rows.start] = held[low - first : high - first]
            found += high - low
    if found < len(taken):
        raise LimbeckError(f"rows {rows.start} to {rows.stop} were requested, but the group holds {found} of them.")
    return taken
