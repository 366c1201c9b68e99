"""A root module small enough to compute by hand, the AdamW step of its parameters in float64, and a process group of one
rank for engines that need one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.strategies.base import EngineState, MicroBatches
from limbeck.strategies.shards import whole_box
from limbeck.strategies.world import World

ALONE = World(0, 1, torch.device("cpu"))


class TinyRoot(nn.Module):
    """Two layers under ``model``. The loss is ``factor`` × the sum of squares of the outputs; the last bias is frozen."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        self.model[1].bias.requires_grad_(False)

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        outputs = self.model(inputs)
        if outputs.dtype is torch.float16:  # which cannot hold the scale of the loss
            outputs = outputs.float()
        return SimpleNamespace(loss=self.factor * outputs.square().sum())


def make_root(factor: float = 1.0) -> TinyRoot:
    """The same root on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return TinyRoot(factor)


def make_inputs(steps: int) -> list[Tensor]:
    """One micro-batch for each step, of growing size, so that the gradient norm changes from step to step."""
    generator = torch.Generator().manual_seed(4)
    return [(1 + step) * torch.randn(5, 4, generator=generator) for step in range(steps)]


def micro_batches(*inputs: Tensor) -> MicroBatches[Tensor]:
    return MicroBatches(len(inputs), lambda: iter(inputs))


def whole_state(engine) -> EngineState[Tensor]:
    """The state of an engine that is alone in its process, as whole tensors of their own."""
    state = engine.state_dict()

    def whole(shards) -> dict[str, Tensor]:
        assert all(part.box == whole_box(part.shape) for (part,) in shards.values())
        return {name: part.read().clone() for name, (part,) in shards.items()}

    return EngineState(whole(state.model), whole(state.optimizer), state.scaler)


def train_step(engine, *inputs: Tensor) -> float:
    """One step of ``engine``; returns the norm that it reports."""
    for _ in engine.forward_backward(micro_batches(*inputs)):
        pass
    return engine.step().item()


class ReferenceAdamW:
    """AdamW with clipping in float64, written out from the paper (https://arxiv.org/abs/1711.05101, algorithm 2)."""

    def __init__(
        self, root: TinyRoot, *, lr: float, betas: tuple[float, float], eps: float, decay: float, max_norm: float
    ) -> None:
        self.root = root.double()
        self.lr, self.betas, self.eps, self.decay, self.max_norm = lr, betas, eps, decay, max_norm
        self.trained = {name: p for name, p in self.root.named_parameters() if p.requires_grad}
        self.m = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        self.t = 0

    def step(self, inputs: Tensor) -> float:
        """Returns the gradient norm before clipping."""
        gradients = torch.autograd.grad(self.root(inputs.double()).loss, list(self.trained.values()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        scale = min(1.0, self.max_norm / norm) if self.max_norm else 1.0
        self.t += 1
        (b1, b2), t = self.betas, self.t
        for (name, parameter), gradient in zip(self.trained.items(), gradients, strict=True):
            m, v, g = self.m[name], self.v[name], gradient * scale
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            decay = self.decay if parameter.ndim >= 2 else 0.0
            with torch.no_grad():
                parameter -= self.lr * decay * parameter
                parameter -= self.lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
        return norm

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().float() for name, p in self.root.model.named_parameters()}


@contextmanager
def deepspeed_alone() -> Iterator[None]:
    """DeepSpeed in a process group of this process alone, which is gone afterwards."""
    import deepspeed

    from limbeck.strategies.deepspeed.library import load_deepspeed

    try:
        with patch.dict(os.environ):
            load_deepspeed()
            yield
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        if dist.is_initialized():
            dist.destroy_process_group()
