"""A trained module that is one stage of a pipeline, stepped by PyTorch's ``torch.distributed.pipelining``.

A step's micro-batches follow each other through the stages: one forward, one backward in turns (1F1B), or where there are fewer
of them than stages all forward and then all backward (GPipe). Every rank of a pipeline has the same micro-batches, so only
hidden states and their gradients travel; as PyTorch wants messages of one size, the shorter are padded on their way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from limbeck.strategies.pipeline_parallel import PipelineGroup, collect
from limbeck.strategies.state import gather_model, gather_optimizer
from limbeck.strategies.torch_engine import TorchEngine, gradient_norm
from limbeck.strategies.world import World


class StageModule(nn.Module):
    """What a stage computes: from the message of the stage before the one for the next, or on the last stage a loss.

    width: numbers in a slot, one token's, of a message. results: what the last stage has made of each micro-batch.
    """

    width: int

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []

    def slots(self, inputs: Sequence[Any]) -> int:
        """How many slots a micro-batch's message needs."""
        raise NotImplementedError

    def begin(self, work: Sequence[Sequence[Any]], slots: int) -> None:
        """The calls that follow are for the micro-batches of ``work`` in turn, with messages of so many ``slots``."""
        raise NotImplementedError


class PipelineEngine(TorchEngine):
    """A ``StageModule``, sharded by ``shard`` among the ranks of its stage.

    dtype: of messages. tied: the names of the embeddings and of the output head, when these are one parameter of the model:
    the first stage and the last each keep a copy, and add up their gradients.
    """

    root: StageModule

    def __init__(
        self,
        root: StageModule,
        optimizer: torch.optim.Optimizer,
        world: World,
        stages: PipelineGroup,
        *,
        dtype: torch.dtype,
        max_norm: float = 0.0,
        tied: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(root, optimizer, world, max_norm=max_norm)
        self._stages, self._dtype, self._device_of = stages, dtype, world.device
        self._tied = tied
        self._ends = None if tied is None else _ends(world, stages)

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass alone; its result on the last stage, None on the others."""
        stages, slots = self._stages, self.root.slots(inputs)
        self.root.begin([inputs], slots)
        message = torch.empty(slots, self.root.width, dtype=self._dtype, device=self._device_of)
        sent = self.root(message if stages.is_first else stages.receive(message))
        if stages.is_last:
            return self.root.results[0]
        stages.send_on(sent)
        return None

    def run(self, work: Sequence[Sequence[Any]]) -> list[Any]:
        """Forward and backward of a step's micro-batches; their results on the last stage, none on the others."""
        stages, slots = self._stages, max(map(self.root.slots, work))
        self.root.begin(work, slots)
        message = torch.empty(slots, self.root.width, dtype=self._dtype, device="meta", requires_grad=True)
        places = torch.zeros(len(work), device=self._device_of)  # what PyTorch cuts into micro-batches
        stage = PipelineStage(
            self.root,
            stages.number,
            stages.count,
            self._device_of,
            input_args=places[:1] if stages.is_first else message,
            output_args=places[:1] if stages.is_last else message,
            group=stages.group,
        )
        kind = Schedule1F1B if len(work) >= stages.count else ScheduleGPipe
        schedule = kind(stage, len(work), loss_fn=lambda loss, target: loss, scale_grads=False)
        schedule.step(*([places] if stages.is_first else []), target=places if stages.is_last else None)
        return self.root.results

    def step(self) -> Tensor:
        if self._ends is not None and (self._stages.is_first or self._stages.is_last):
            grad = self.root.get_parameter(self._copy or self._original).grad
            if grad is not None:
                dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=self._ends)
        return super().step()

    def gradient_norm(self) -> Tensor:
        counted = [parameter for name, parameter in self.root.named_parameters() if name != self._copy]
        square = gradient_norm(counted) ** 2
        dist.all_reduce(square, group=self._stages.group)
        return square.sqrt()

    def gather_model(self) -> dict[str, Any]:
        return self._collected(gather_model(self.root, keep=self._keeps))

    def scatter_model(self, state: Mapping[str, Tensor]) -> None:
        super().scatter_model({name: state[self._source(name)] for name in self._mine(state)})

    def gather_optimizer(self) -> dict[str, Tensor]:
        return self._collected(gather_optimizer(self.root, self.optimizer, keep=self._keeps))

    def scatter_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        entries: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, entry = key.rsplit("|", 1)
            entries.setdefault(name, {})[entry] = value
        own = {name: entries[self._source(name)] for name in self._mine(entries)}
        super().scatter_optimizer({f"{name}|{entry}": value for name in own for entry, value in own[name].items()})

    @property
    def _original(self) -> str:
        """The embeddings' name."""
        return self._tied[0] if self._tied else ""

    @property
    def _copy(self) -> str:
        """The name of this stage's copy of them, if it has one beside the first stage's."""
        return self._tied[1] if self._tied and self._stages.is_last else ""

    @property
    def _keeps(self) -> bool:
        """Whether this rank is of the main process's pipeline, which brings the stages together."""
        return dist.get_process_group_ranks(self._stages.group)[0] == 0

    def _collected(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        own = {name: tensor for name, tensor in tensors.items() if name.split("|")[0] != self._copy}
        return collect(own, self._stages) if self._keeps else {}

    def _source(self, name: str) -> str:
        return self._original if name == self._copy else name

    def _mine(self, state: Mapping[str, Any]) -> list[str]:
        return [name for name in self.root.state_dict() if self._source(name) in state]


def _ends(world: World, stages: PipelineGroup) -> dist.ProcessGroup | None:
    """The first and the last rank of this rank's pipeline; every process must call it."""
    mine = dist.get_process_group_ranks(stages.group)
    apart = world.tensor * world.context
    found = None
    for first in (rank for rank in range(world.size) if rank // apart % world.pipeline == 0):
        group = dist.new_group([first, first + apart * (world.pipeline - 1)])
        found = group if first == mine[0] else found
    return found
