"""One teacher replica computed by several ranks: slices of its matrices, parts of its rows' time, some of its layers.

The student may be divided otherwise. Where the ranks of a replica have different batches, all of them compute one
rank's batch after the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.models import HiddenStateCapture, hidden_states
from limbeck.objectives import OutputHead
from limbeck.strategies.base import ModelParallelGroup
from limbeck.strategies.context_parallel import gather_context
from limbeck.strategies.named_tensors import broadcast_named
from limbeck.teachers.signals import TeacherRequest


def exchange_batches(
    body: nn.Module,
    head: OutputHead,
    group: ModelParallelGroup,
    request: TeacherRequest,
    taps: HiddenStateCapture | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden states [supervised, H] of this rank's request, and what ``taps`` captures on any of the stages, by
    name: [batch, time, width]. Every rank of ``group`` must call it.
    """
    own, captured = request.supervised.new_empty(0), {}
    for owner in group.owners:
        current = request if len(group.owners) == 1 else broadcast_request(group, owner, request)
        states, found = _hidden_states(body, head, group, current, taps or HiddenStateCapture())
        if owner == group.owner:
            own, captured = states.flatten(0, 1).index_select(0, request.supervised), found
    return own, captured


def broadcast_request(group: ModelParallelGroup, owner: int, own: TeacherRequest) -> TeacherRequest:
    """The request of the global rank ``owner`` on all ranks, each of which passes its own; supervised positions stay
    local.
    """
    device = own.input_ids.device
    received = broadcast_named(own.tensors(), group.group, dist.get_group_rank(group.group, owner), device)
    return replace(TeacherRequest.from_tensors(received, own.spec), supervised=own.supervised, labels=own.labels)


def _hidden_states(
    body: nn.Module, head: OutputHead, group: ModelParallelGroup, request: TeacherRequest, taps: HiddenStateCapture
) -> tuple[Tensor, dict[str, Tensor]]:
    """[batch, time, hidden], and what ``taps`` captures, on every rank; time is padded to a multiple of the context-parallel
    ranks on the way.
    """
    if group.context is None:
        return _through_stages(body, head, group, request.input_ids, request.position_ids, request.documents, taps)
    time = request.input_ids.shape[1]
    ranks, rank = dist.get_world_size(group.context), dist.get_rank(group.context)
    width = -(-time // ranks)
    more, positions, documents = width * ranks - time, request.position_ids, request.documents
    if positions is None:
        positions = torch.arange(time, device=request.input_ids.device).expand_as(request.input_ids)
    if documents is not None:
        documents = (*documents[:-1], documents[-1] + more)
    ids, positions = (
        torch.nn.functional.pad(x, (0, more))[:, rank * width : (rank + 1) * width].contiguous()
        for x in (request.input_ids, positions)
    )
    states, found = _through_stages(body, head, group, ids, positions, documents, taps)
    whole = {name: gather_context(output, group.context)[:, :time] for name, output in found.items()}
    return gather_context(states, group.context)[:, :time], whole


def _through_stages(
    body: nn.Module,
    head: OutputHead,
    group: ModelParallelGroup,
    ids: Tensor,
    positions: Tensor | None,
    documents: tuple[int, ...] | None,
    taps: HiddenStateCapture,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden states, and what ``taps`` captures, through all pipeline stages, on each of them."""
    pipeline, embedded = group.pipeline, None
    if pipeline is not None and not pipeline.is_first:
        embedded = pipeline.recv_forward(head.weight.new_empty(*ids.shape, head.weight.shape[1]))
    with taps.capture() as captured:
        states = hidden_states(body, ids, positions, documents, embedded)
    found = taps.outputs(captured, ids.shape)
    if pipeline is None:
        return states, found
    if not pipeline.is_last:
        pipeline.send_forward(states)
    states = pipeline.broadcast_last(states)
    if not taps.names:  # on every stage
        return states, {}
    return states, dict(pipeline.broadcast_all(found.items(), states.device))
