"""The engine of one pipeline stage, stepped by PyTorch's ``torch.distributed.pipelining``.

A step's micro-batches follow each other through the stages: one forward, one backward (1F1B), or with fewer
micro-batches than stages all forward and then all backward (GPipe). Every rank of a pipeline has the same
micro-batches, so only hidden states and their gradients travel. PyTorch requires messages of one size: shorter ones are
padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from limbeck.strategies.base import MODEL, EngineState, MicroBatches, ModelOutline
from limbeck.strategies.gradient_clipping import gradient_norm
from limbeck.strategies.pipeline_parallel import PipelineGroup
from limbeck.strategies.shards import Shard, Sliceable
from limbeck.strategies.state import model_shards, optimizer_shards
from limbeck.strategies.torch_engine import TorchEngine
from limbeck.strategies.world import World


class StageModule(nn.Module):
    """What a stage computes: from the message of the previous stage that for the next one, or on the last stage a loss.

    outputs: what the last stage made of each micro-batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []

    def num_slots(self, micro_batch: Any) -> int:
        """How many token slots the micro-batch's message needs."""
        raise NotImplementedError

    def begin(self, micro_batches: Sequence[Any], slots: int) -> None:
        """The following forward calls are for ``micro_batches`` in turn, with messages of ``slots`` slots."""
        raise NotImplementedError


class PipelineEngine(TorchEngine):
    """A ``StageModule``, sharded among the ranks of its stage. ``message_dtype``: of the hidden states that travel.

    Embeddings and output head that are one parameter are kept by the first and the last stage, which sum their
    gradients.
    """

    root: StageModule

    def __init__(
        self,
        root: StageModule,
        optimizer: torch.optim.Optimizer,
        world: World,
        pipeline: PipelineGroup,
        outline: ModelOutline,
        *,
        message_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        super().__init__(root, optimizer, world, **options)
        self._pipeline, self._outline, self._target = pipeline, outline, world.device
        self._message_dtype = message_dtype
        self._ends = None if outline.tied is None else _end_stages(world, pipeline)

    def forward_backward(self, micro_batches: MicroBatches[Any]) -> Iterator[Any]:
        self._set_training(True)
        pipeline, inputs = self._pipeline, list(micro_batches)
        slots = max(map(self.root.num_slots, inputs))
        self.root.begin(inputs, slots)
        message = torch.empty(slots, self._outline.width, dtype=self._message_dtype, device="meta", requires_grad=True)
        indices = torch.zeros(len(inputs), device=self._target)  # what PyTorch splits into micro-batches
        stage = PipelineStage(
            self.root,
            pipeline.stage,
            pipeline.num_stages,
            self._target,
            input_args=indices[:1] if pipeline.is_first else message,
            output_args=indices[:1] if pipeline.is_last else message,
            group=pipeline.group,
        )
        kind = Schedule1F1B if len(inputs) >= pipeline.num_stages else ScheduleGPipe
        schedule = kind(stage, len(inputs), loss_fn=lambda loss, target: loss, scale_grads=False)
        schedule.step(*([indices] if pipeline.is_first else []), target=indices if pipeline.is_last else None)
        yield from self.root.outputs

    @torch.no_grad()
    def evaluate(self, micro_batch: Any) -> Any | None:
        self._set_training(False)
        pipeline, slots = self._pipeline, self.root.num_slots(micro_batch)
        self.root.begin([micro_batch], slots)
        message = torch.empty(slots, self._outline.width, dtype=self._message_dtype, device=self._target)
        sent = self.root(message if pipeline.is_first else pipeline.recv_forward(message))
        if pipeline.is_last:
            return self.root.outputs[0]
        pipeline.send_forward(sent)
        return None

    def step(self) -> Tensor:
        if self._ends is not None and (self._pipeline.is_first or self._pipeline.is_last):
            grad = self.root.get_parameter(self._tied_copy or self._tied_original).grad
            if grad is not None:
                dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=self._ends)
        return super().step()

    def gradient_norm(self) -> Tensor:
        counted = [parameter for name, parameter in self.root.named_parameters() if name != self._tied_copy]
        square = gradient_norm(counted) ** 2
        dist.all_reduce(square, group=self._pipeline.group)
        return square.sqrt()

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        own = ((name, tensor) for name, tensor in super().iter_weights() if f"{MODEL}{name}" != self._tied_copy)
        return self._pipeline.broadcast_all(own, self._target)

    def state_dict(self) -> EngineState[Sequence[Shard]]:
        return EngineState(
            self._without_copy(model_shards(self.root, super().trained_names())),
            self._without_copy(optimizer_shards(self.root, self.optimizer)),
            self._scaler.state_dict(),
        )

    def load_state_dict(self, state: EngineState[Sliceable]) -> None:
        entries: dict[str, dict[str, Sliceable]] = {}
        for key, value in state.optimizer.items():
            name, entry = key.rsplit("|", 1)
            entries.setdefault(name, {})[entry] = value
        own = {name: entries[self._stored_name(name)] for name in self._present(entries)}
        moments = {f"{name}|{entry}": value for name in own for entry, value in own[name].items()}
        masters = {name: state.model[self._stored_name(name)] for name in self._present(state.model)}
        super().load_state_dict(EngineState(masters, moments, state.scaler))

    def trained_names(self) -> set[str]:
        # Feature projections are not part of the model; they are not built with pipelines.
        return set(self._outline.trained)

    @property
    def _tied_original(self) -> str:
        """The name of the embeddings, if the output head is the same parameter."""
        return self._outline.tied[0] if self._outline.tied else ""

    @property
    def _tied_copy(self) -> str:
        """The name of this stage's copy of them, if it has one beside the first stage's."""
        return self._outline.tied[1] if self._outline.tied and self._pipeline.is_last else ""

    def _without_copy(self, shards: dict[str, list[Shard]]) -> dict[str, list[Shard]]:
        return {name: parts for name, parts in shards.items() if name.split("|")[0] != self._tied_copy}

    def _stored_name(self, name: str) -> str:
        return self._tied_original if name == self._tied_copy else name

    def _present(self, state: Mapping[str, Any]) -> list[str]:
        return [name for name in self.root.state_dict() if self._stored_name(name) in state]


def _end_stages(world: World, pipeline: PipelineGroup) -> dist.ProcessGroup | None:
    """The group of the first and the last rank of this rank's pipeline. Every process must call it."""
    first = dist.get_process_group_ranks(pipeline.group)[0]
    found = None
    for ranks in world.dims.pipelines().tolist():
        group = dist.new_group([ranks[0], ranks[-1]])
        found = group if ranks[0] == first else found
    return found
