"""A teacher that neighbouring ranks hold together: slices of its matrices, stretches of its rows' time, or both.

The student may be spread otherwise. Where the ranks have different batches they go through them in turns, all of them working
on one rank's batch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.models import hidden_states
from limbeck.objectives import OutputHead
from limbeck.strategies.context import join_stretches
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.signal import Signal


@dataclass(frozen=True)
class Circle:
    """The ranks that hold one teacher together, in ``group``.

    context: those of them that divide its rows' time, if any do. owners: the ranks (of the whole world) that bring a batch of
    their own. mine: the one of them with this rank's batch.
    """

    group: dist.ProcessGroup
    context: dist.ProcessGroup | None
    owners: Sequence[int]
    mine: int


class TogetherTeacher(LocalTeacher):
    """A body that the ranks of ``circle`` run together, and its head, both frozen."""

    def __init__(self, model_body: nn.Module, head: OutputHead, num_parameters: int, circle: Circle) -> None:
        super().__init__(model_body, head, num_parameters)
        self._circle = circle

    @torch.no_grad()
    def signals(self, batch: Batch) -> Signal:
        """The signal for this rank's micro-batch; every rank of the circle must call it."""
        if len(self._circle.owners) == 1:
            return super().signals(batch)
        asked = batch.translation or batch
        positions, documents = (None, None) if batch.translation else (batch.position_ids, batch.documents)
        for owner in self._circle.owners:
            heard = self._tell(owner, asked.input_ids, positions, documents)
            if owner == self._circle.mine:
                signal = super().signals(batch)
            else:
                self._hidden(*heard)
        return signal

    def _tell(
        self, owner: int, ids: Tensor, positions: Tensor | None, documents: Sequence[int] | None
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...] | None]:
        """The owner's batch, given everyone's own."""
        shape = torch.tensor([*ids.shape, positions is not None, len(documents or ())], device=ids.device)
        dist.broadcast(shape, owner, group=self._circle.group)
        rows, time, placed, count = shape.tolist()
        lengths = torch.tensor(documents if documents and len(documents) == count else [0] * count, device=ids.device)
        speaks = dist.get_rank() == owner
        ids = ids.contiguous() if speaks else ids.new_empty(rows, time)
        dist.broadcast(ids, owner, group=self._circle.group)
        if placed:
            positions = positions.contiguous() if speaks and positions is not None else torch.empty_like(ids)
            dist.broadcast(positions, owner, group=self._circle.group)
        if count:
            dist.broadcast(lengths, owner, group=self._circle.group)
        return ids, positions if placed else None, tuple(lengths.tolist()) if count else None

    def _hidden(self, ids: Tensor, positions: Tensor | None, documents: Sequence[int] | None) -> Tensor:
        context = self._circle.context
        if context is None:
            return super()._hidden(ids, positions, documents)
        ranks, rank, time = dist.get_world_size(context), dist.get_rank(context), ids.shape[1]
        width = -(-time // ranks)
        more = width * ranks - time
        if positions is None:
            positions = torch.arange(time, device=ids.device).expand_as(ids)
        if documents is not None:
            documents = (*documents[:-1], documents[-1] + more)
        ids, positions = (
            torch.nn.functional.pad(x, (0, more))[:, rank * width : (rank + 1) * width].contiguous()
            for x in (ids, positions)
        )
        return join_stretches(hidden_states(self.body, ids, positions, documents), context)[:, :time]
