"""Pipeline parallelism: each stage, one rank or a group of them, holds some of a model's layers and hands on what they give.

A Hugging Face body keeps its own forward pass: layers that are elsewhere are replaced by ones that change nothing, and a stage
after the first is given hidden states in place of embeddings. So masks, positions and whatever a model does around its layers
stay the model's own business, and parameters keep their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.errors import LimbeckError


@dataclass(frozen=True)
class PipelineGroup:
    """The stages of one pipeline: the ranks of ``group``, in order."""

    group: dist.ProcessGroup

    @property
    def count(self) -> int:
        """The number of stages."""
        return dist.get_world_size(self.group)

    @property
    def number(self) -> int:
        """Which of them this rank is."""
        return dist.get_rank(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this rank reads token ids."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the final norm and the output head."""
        return self.number == self.count - 1

    def send_on(self, x: Tensor) -> None:
        """Hand ``x`` to the next stage."""
        dist.send(x.contiguous(), group=self.group, group_dst=self.number + 1)

    def receive(self, like: Tensor) -> Tensor:
        """What the stage before hands on, written into ``like``."""
        dist.recv(like, group=self.group, group_src=self.number - 1)
        return like

    def share_last(self, x: Tensor) -> Tensor:
        """The last stage's ``x`` on every stage; the others give a tensor of the same shape to write into."""
        x = x.contiguous()
        dist.broadcast(x, group=self.group, group_src=self.count - 1)
        return x


def check_stages(trunk: Any, stages: int, name: str, role: str) -> None:
    """Raise LimbeckError unless the body ``trunk`` of the model ``name`` can be divided into so many stages."""
    if stages == 1:
        return
    key = f"{role}.strategy_args.strategy_config.pipeline_model_parallel_size = {stages}"
    parts = _parts(trunk)
    if parts is None:
        raise LimbeckError(
            f"{key}: {type(trunk).__name__} comes without a plan for pipelines (base_model_pp_plan); use 1, and FSDP2 shards "
            "it all the same."
        )
    layers = len(parts[1])
    if stages > layers:
        raise LimbeckError(f"{key} is more than the layers of {name} ({layers}); use at most that many.")


def keep_stage(model: Any, trunk: Any, number: int, count: int) -> None:
    """Keep of ``model``, whose body is ``trunk``, what stage ``number`` of ``count`` computes: layers as evenly as they can be
    dealt, and the first stage what comes before them, the last one what comes after them and the output head.
    """
    parts = _parts(trunk)
    assert parts is not None
    before, layers, after = parts
    is_first, is_last = number == 0, number == count - 1
    low, high = (-(-len(layers) * place // count) for place in (number, number + 1))
    for i in range(len(layers)):
        if not low <= i < high:
            layers[i] = _Elsewhere(layers[i])
    for name in (() if is_first else before) + (() if is_last else after):
        setattr(trunk, name, _Elsewhere(getattr(trunk, name)))
    if not is_last:
        model.set_output_embeddings(None)


def _parts(trunk: Any) -> tuple[tuple[str, ...], nn.ModuleList, tuple[str, ...]] | None:
    """The names of what comes before the layers of ``trunk``, the layers, and the names of what comes after them."""
    plan = list(getattr(trunk.config.get_text_config(), "base_model_pp_plan", None) or ())
    for i, name in enumerate(plan):
        layers = getattr(trunk, name, None)
        if isinstance(layers, nn.ModuleList):
            return tuple(plan[:i]), layers, tuple(plan[i + 1 :])
    return None


class _Elsewhere(nn.Module):
    """In the place of a module that another stage has; a body may still ask it what it was told (its kind of attention)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        told = {name: value for name, value in vars(module).items() if isinstance(value, (str, int))}
        vars(self).update({name: value for name, value in told.items() if name != "training"})

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        return hidden_states


def collect(tensors: Mapping[str, Tensor], stages: PipelineGroup) -> dict[str, Tensor]:
    """The CPU tensors of all stages on the first one; nothing on the others."""
    if not stages.is_first:
        facts = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}
        header = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        for part in (torch.tensor(header.numel()), header, *tensors.values()):
            dist.send(part.contiguous(), group=stages.group, group_dst=0)
        return {}
    whole = dict(tensors)
    for stage in range(1, stages.count):

        def receive(like: Tensor, stage: int = stage) -> Tensor:
            dist.recv(like, group=stages.group, group_src=stage)
            return like

        header = receive(torch.empty(int(receive(torch.tensor(0))), dtype=torch.uint8))
        for name, (dtype, *shape) in json.loads(header.numpy().tobytes()).items():
            whole[name] = receive(torch.empty(shape, dtype=getattr(torch, dtype)))
    return whole
