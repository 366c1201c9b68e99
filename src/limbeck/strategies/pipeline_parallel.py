"""Pipeline parallelism: each stage, one rank or a group of them, holds some of a model's layers.

A Hugging Face body keeps its own forward pass: layers of other stages are replaced by identities, and a stage after the
first receives hidden states in place of embeddings. Masks, positions and everything a model does around its layers stay
the model's own, and parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.strategies.named_tensors import broadcast_named

_PLANS: dict[str, tuple[str, ...]] = {"nemotron_h": ("embeddings", "layers", "norm_f")}
"""``model_type`` to the submodules of a body in their order, for models without a plan of their own."""


@dataclass(frozen=True)
class PipelineGroup:
    """The stages of one pipeline: the ranks of ``group``, in order."""

    group: dist.ProcessGroup

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return dist.get_world_size(self.group)

    @property
    def stage(self) -> int:
        """The number of this rank's stage, from 0."""
        return dist.get_rank(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this rank reads token ids."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the final norm and the output head."""
        return self.stage == self.num_stages - 1

    def send_forward(self, x: Tensor) -> None:
        """Send ``x`` to the next stage; after the last comes the first, which may hold further layers."""
        dist.send(x.contiguous(), group=self.group, group_dst=(self.stage + 1) % self.num_stages)

    def recv_forward(self, out: Tensor) -> Tensor:
        """Receive the previous stage's output into ``out`` and return it."""
        dist.recv(out, group=self.group, group_src=(self.stage - 1) % self.num_stages)
        return out

    def broadcast_last(self, x: Tensor) -> Tensor:
        """The last stage's ``x`` on every stage; the others pass a tensor of the same shape."""
        x = x.contiguous()
        dist.broadcast(x, group=self.group, group_src=self.num_stages - 1)
        return x

    def broadcast_all(self, tensors: Iterable[tuple[str, Tensor]], device: Any) -> Iterator[tuple[str, Tensor]]:
        """The named tensors of every stage, stage by stage, on all ranks, one tensor at a time."""
        own = iter(tensors)
        for stage in range(self.num_stages):
            while True:
                item = next(own, None) if stage == self.stage else None
                sent = broadcast_named(None if item is None else dict([item]), self.group, stage, device)
                if not sent:
                    break
                yield from sent.items()


def check_pipeline(body: Any, stages: int, name: str, role: str) -> None:
    """Raise LimbeckError unless ``body`` of the model ``name`` can be divided into ``stages`` stages."""
    if stages == 1:
        return
    key = f"{role}.strategy_args.strategy_config.pipeline_model_parallel_size = {stages}"
    parts = _parts(body)
    if parts is None:
        raise LimbeckError(
            f"{key}: {type(body).__name__} comes without a plan for pipelines (base_model_pp_plan); use 1, and FSDP2 shards "
            "it all the same."
        )
    layers = len(parts[1])
    if stages > layers:
        raise LimbeckError(f"{key} is more than the layers of {name} ({layers}); use at most that many.")


def keep_stage(model: Any, body: Any, stage: int, stages: int) -> None:
    """Reduce ``model`` in place to what one stage computes.

    Layers are divided as evenly as possible. The first stage also keeps what comes before them, the last one what comes
    after them and the output head.
    """
    parts = _parts(body)
    assert parts is not None
    before, layers, after = parts
    is_first, is_last = stage == 0, stage == stages - 1
    low, high = (-(-len(layers) * index // stages) for index in (stage, stage + 1))
    for i in range(len(layers)):
        if not low <= i < high:
            layers[i] = _OtherStage(layers[i])
    for name in (() if is_first else before) + (() if is_last else after):
        setattr(body, name, _OtherStage(getattr(body, name)))
    if not is_last:
        model.set_output_embeddings(None)


def _parts(body: Any) -> tuple[tuple[str, ...], nn.ModuleList, tuple[str, ...]] | None:
    """Names of what comes before the layers of ``body``, the layers, and names of what comes after them."""
    config = body.config.get_text_config()
    plan: list[str] = list(getattr(config, "base_model_pp_plan", None) or _PLANS.get(config.model_type, ()))
    for i, name in enumerate(plan):
        layers = getattr(body, name, None)
        if isinstance(layers, nn.ModuleList):
            return tuple(plan[:i]), layers, tuple(plan[i + 1 :])
    return None


class _OtherStage(nn.Module):
    """Identity in place of another stage's module, with its plain attributes: a body reads a layer's kind of
    attention.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(module).items() if isinstance(value, (str, int))}
        vars(self).update({name: value for name, value in plain.items() if name != "training"})

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states
