"""A teacher that neighbouring ranks hold together: slices of its matrices, stretches of its rows' time, some of its layers.

The student may be spread otherwise. Where the ranks have different batches they go through them in turns, all of them working
on one rank's batch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.models import hidden_states
from limbeck.objectives import OutputHead
from limbeck.strategies.context_parallel import gather_context
from limbeck.strategies.pipeline_parallel import PipelineGroup
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.signals import TeacherRequest


@dataclass(frozen=True)
class ModelParallelGroup:
    """The ranks that hold one teacher together, in ``group``.

    context: those of them that divide its rows' time, if any do. stages: those that divide its layers. owners: the ranks (of
    the whole world) that bring a batch of their own. mine: the one of them with this rank's batch.
    """

    group: dist.ProcessGroup
    context: dist.ProcessGroup | None
    stages: PipelineGroup | None
    owners: Sequence[int]
    mine: int


class ModelParallelTeacher(LocalTeacher):
    """A body that the ranks of ``circle`` run together, and its head, both frozen."""

    def __init__(
        self, model_body: nn.Module, head: OutputHead, num_parameters: int, circle: ModelParallelGroup
    ) -> None:
        super().__init__(model_body, head, num_parameters)
        self._circle = circle

    @torch.no_grad()
    def hidden(self, question: TeacherRequest) -> Tensor:
        """The last hidden states at the positions that this rank asks about; every rank of the circle must call it."""
        if len(self._circle.owners) == 1:
            return super().hidden(question)
        mine = question.supervised.new_empty(0)
        for owner in self._circle.owners:
            told = self._tell(owner, question)
            states = self._states(told)
            if owner == self._circle.mine:
                mine = states.flatten(0, 1).index_select(0, question.supervised)
        return mine

    def _tell(self, owner: int, own: TeacherRequest) -> TeacherRequest:
        """The owner's question, given everyone's own."""
        speaks, group, device = dist.get_rank() == owner, self._circle.group, own.input_ids.device

        def tell(tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
            heard = torch.empty(shape, dtype=torch.int64, device=device)
            if speaks and tensor is not None:
                heard.copy_(tensor)
            dist.broadcast(heard, owner, group=group)
            return heard

        documents = own.documents or ()
        facts = torch.tensor([*own.input_ids.shape, own.position_ids is not None, len(documents)])
        rows, time, placed, count = tell(facts, (4,)).tolist()
        ids = tell(own.input_ids, (rows, time))
        positions = tell(own.position_ids, (rows, time)) if placed else None
        lengths = tell(torch.tensor(documents, dtype=torch.int64), (count,)).tolist() if count else None
        return TeacherRequest(ids, positions, None if lengths is None else tuple(lengths), own.supervised)

    def _states(self, question: TeacherRequest) -> Tensor:
        context = self._circle.context
        if context is None:
            ids, positions, documents = question.input_ids, question.position_ids, question.documents
            return self._through(ids, positions, documents)
        time = question.input_ids.shape[1]
        ranks, rank = dist.get_world_size(context), dist.get_rank(context)
        width = -(-time // ranks)
        more, positions, documents = width * ranks - time, question.position_ids, question.documents
        if positions is None:
            positions = torch.arange(time, device=question.input_ids.device).expand_as(question.input_ids)
        if documents is not None:
            documents = (*documents[:-1], documents[-1] + more)
        ids, positions = (
            torch.nn.functional.pad(x, (0, more))[:, rank * width : (rank + 1) * width].contiguous()
            for x in (question.input_ids, positions)
        )
        return gather_context(self._through(ids, positions, documents), context)[:, :time]

    def _through(self, ids: Tensor, positions: Tensor | None, documents: tuple[int, ...] | None) -> Tensor:
        """The last hidden states, through all stages."""
        stages, embedded = self._circle.stages, None
        if stages is None:
            return hidden_states(self.body, ids, positions, documents)
        message = self.head.weight.new_empty(*ids.shape, self.head.weight.shape[1])
        if not stages.is_first:
            embedded = stages.receive(message)
        states = hidden_states(self.body, ids, positions, documents, embedded)
        if not stages.is_last:
            stages.send_on(states)
        return stages.share_last(states)
