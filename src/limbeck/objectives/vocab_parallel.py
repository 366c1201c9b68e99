"""Reductions over the vocabulary, for code that does not know whether it holds all of it or one rank's slice.

Shapes: n rows, V columns held here, k columns of the whole vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.errors import LimbeckError


class VocabReducer:
    """The whole vocabulary is held here."""

    def width(self, x: Tensor) -> int:
        """Columns of the whole vocabulary, of which x [n, V] is the part held here."""
        return x.shape[-1]

    def sum(self, x: Tensor) -> Tensor:
        """[n, m] of partial sums → [n, m] of sums over all slices."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """The same for maxima."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[..., V] of a slice → [..., whole vocabulary], perhaps with zeros between the slices."""
        return x

    def topk(self, k: int, *rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each [n, V] the largest k entries of the whole rows and their columns, both [n, k]."""
        return [tuple(x.topk(min(k, x.shape[-1]), dim=-1)) for x in rows]  # type: ignore[misc]

    def share(self, x: Tensor, columns: Tensor) -> Tensor:
        """The entries [n, k] at ``columns``, 0 for those that are not held here."""
        return x.gather(-1, columns)

    def pick(self, x: Tensor, columns: Tensor) -> Tensor:
        """The entries [n, k] of the whole rows at ``columns``."""
        return self.sum(self.share(x, columns))

    def scatter_add_(self, x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        """x [n, V], to which values [n, k] are added where the columns are held here."""
        return x.scatter_add_(-1, columns, values)


NO_SHARDING = VocabReducer()


class VocabParallel(VocabReducer):
    """This rank of ``group`` holds the vocabulary's columns [start, start + size) of ``vocab_size``.

    The slices are as even as they can be, larger ones first: ``head.weight[parallel.columns]`` is a rank's part of a head.
    With ``head_rows``, the head has so many rows (perhaps more than the vocabulary, to pad it) and is cut into equal parts of
    which the last may be smaller, as DTensor cuts.
    A chunk costs at most five collectives, none wider than a few numbers per row (top-k gathers 4 k, adaptive_kl the
    probabilities); at the end the gradient of the hidden states is summed once.
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
        self._widest = self._most = -(-vocab_size // self._ranks)
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
            self._most = each
            self.start, self._widest = rank * each, min(each, vocab_size)
            self.size = min(each, vocab_size - self.start)

    def check(self, vocab_size: int | None, **columns: int | None) -> None:
        """Raise LimbeckError unless what student and teacher give here is this rank's part, or that and padding of the head."""
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise LimbeckError(
                f"vocab_size={vocab_size} contradicts the {self.vocab_size} of VocabParallel; leave it out."
            )
        for role, count in columns.items():
            if count is not None and self._ranks > 1 and not self.size <= count <= self._most:
                raise LimbeckError(
                    f"the {role} gives {count} columns, and this rank holds {self.size} of {self.vocab_size}; give "
                    "head.weight[parallel.columns], or logits[:, parallel.columns]."
                )

    @property
    def columns(self) -> slice:
        """The columns that are held here."""
        return slice(self.start, self.start + self.size)

    def width(self, x: Tensor) -> int:
        return self.vocab_size

    def sum(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)  # a formula may go on with what it gave
        dist.all_reduce(x, group=self._group)
        return x

    def max(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self._group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._gather(torch.nn.functional.pad(x, (0, self._widest - x.shape[-1]))), -1)

    def topk(self, k: int, *rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        k = min(k, self.vocab_size)
        mine = []
        for x in rows:
            values, columns = x.topk(min(k, x.shape[-1]), dim=-1)
            missing = (0, k - values.shape[-1])
            mine += [
                torch.nn.functional.pad(values.double(), missing, value=-torch.inf),
                torch.nn.functional.pad((columns + self.start).double(), missing),  # exact: below 2⁵³
            ]
        everyone = torch.stack(self._gather(torch.stack(mine)))  # [ranks, 2 · rows, n, k]
        largest = []
        for i, x in enumerate(rows):
            values, columns = (everyone[:, 2 * i + j].movedim(0, 1).flatten(1) for j in (0, 1))
            top = values.topk(k, dim=-1)
            largest.append((top.values.to(x.dtype), columns.gather(-1, top.indices).long()))
        return largest

    def share(self, x: Tensor, columns: Tensor) -> Tensor:
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


def take_rows(shard: Tensor, start: int, wanted: slice, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows ``wanted`` of a matrix whose rows [start, start + len(shard)) are held here and the others by other ranks.

    How a teacher's head, split over one number of ranks, becomes the slice that a student's rank needs: ranks that hold or
    want nothing take part with an empty shard or slice. Raises LimbeckError if nobody holds a wanted row.
    """
    taken = torch.empty(wanted.stop - wanted.start, *shard.shape[1:], dtype=shard.dtype, device=shard.device)
    found = 0
    for rank in range(dist.get_world_size(group)):
        owner = dist.get_global_rank(group, rank) if group is not None else rank
        place = torch.tensor([start, len(shard)], device=shard.device)
        dist.broadcast(place, owner, group=group)
        first, count = place.tolist()
        held = shard.contiguous() if dist.get_rank(group) == rank else shard.new_empty(count, *shard.shape[1:])
        if count:
            dist.broadcast(held, owner, group=group)
        low, high = max(first, wanted.start), min(first + count, wanted.stop)
        if low < high:
            taken[low - wanted.start : high - wanted.start] = held[low - first : high - first]
            found += high - low
    if found < len(taken):
        raise LimbeckError(f"rows {wanted.start} to {wanted.stop} are wanted, and the group holds {found} of them.")
    return taken
