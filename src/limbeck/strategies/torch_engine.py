"""The engine of PyTorch's own optimizers, over a module that is alone in its process or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.strategies.base import MODEL, EngineState, MicroBatches
from limbeck.strategies.gradient_clipping import clip_gradients, gradient_norm
from limbeck.strategies.master_weights import MasterWeights
from limbeck.strategies.shards import Shard, Sliceable
from limbeck.strategies.state import (
    iter_model,
    load_model_state,
    load_optimizer_state,
    model_shards,
    optimizer_shards,
)
from limbeck.strategies.world import World


class TorchEngine:
    """Trains ``root`` with ``optimizer``. See ``limbeck.strategies.base.Engine`` for the methods.

    Args:
        root: the student with its loss; sharded already if several processes share it.
        optimizer: over the trained parameters of ``root``.
        world: the processes that train it.
        compute_dtype: precision of the layers where it is not the parameters' own. Several ranks use FSDP's
            ``param_dtype`` for that. A single process keeps float32 masters and computes in copies of them in bfloat16. In
            float16 it uses autocast, which keeps the sums of the residual stream in float32, where float16 overflows.
        max_norm: gradients are clipped to this norm; 0 is off.
        reduce_partial_gradients: sums gradients of which every tensor-parallel rank has a part; called before clipping.
    """

    def __init__(
        self,
        root: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        compute_dtype: torch.dtype | None = None,
        max_norm: float = 0.0,
        reduce_partial_gradients: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.optimizer, self.max_norm = root, optimizer, max_norm
        self._device = world.device.type
        self._reduce_partial_gradients = reduce_partial_gradients
        self._offloaded: list[tuple[dict[str, Any], str]] = []  # entries of the optimizer state that are on the host
        alone = compute_dtype if world.size == 1 else None
        self._autocast_dtype = alone if alone is torch.float16 else None
        self._masters = None if alone in (None, torch.float16) else MasterWeights(root, alone)
        self._scaler = torch.amp.GradScaler(self._device, enabled=compute_dtype is torch.float16)

    def forward_backward(self, micro_batches: MicroBatches[Any]) -> Iterator[Any]:
        self._set_training(True)
        for micro_batch in micro_batches:
            output = self._forward(micro_batch)
            del micro_batch  # so that the next one is not made beside it
            self._scaler.scale(output.loss).backward()
            if self._masters is not None:
                self._masters.accumulate()
            yield output

    @torch.no_grad()
    def evaluate(self, micro_batch: Any) -> Any | None:
        self._set_training(False)
        return self._forward(micro_batch)

    def step(self) -> Tensor:
        with self._in_float32():
            self._reduce_partial_gradients()
            self._scaler.unscale_(self.optimizer)
            norm = self.gradient_norm()
            clip_gradients(self.root.parameters(), self.max_norm, norm)
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        return norm.to(self._device)  # gradients may be in host memory

    def gradient_norm(self) -> Tensor:
        """The norm of the gradients over all processes."""
        return gradient_norm(self.root.parameters())

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        with self._in_float32():
            for name, tensor in iter_model(self.root, MODEL):
                yield name, tensor.to(self._device)

    def state_dict(self) -> EngineState[Sequence[Shard]]:
        with self._in_float32():
            return EngineState(
                model_shards(self.root, self.trained_names()),
                optimizer_shards(self.root, self.optimizer),
                self._scaler.state_dict(),
            )

    def load_state_dict(self, state: EngineState[Sliceable]) -> None:
        with self._in_float32():
            load_model_state(self.root, state.model)
            load_optimizer_state(self.root, self.optimizer, state.optimizer)
        if self._scaler.is_enabled() and "growth_factor" in state.scaler:
            self._scaler.load_state_dict(dict(state.scaler))

    def trained_names(self) -> set[str]:
        return {name for name, parameter in self.root.named_parameters() if parameter.requires_grad}

    def offload(self) -> None:
        with self._in_float32():
            self.root.to("cpu")
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.device.type == self._device != "cpu":
                    state[key] = value.to("cpu")
                    self._offloaded.append((state, key))
        torch.cuda.empty_cache()

    def reload(self) -> None:
        with self._in_float32():
            self.root.to(self._device)
        while self._offloaded:
            state, key = self._offloaded.pop()
            state[key] = state[key].to(self._device)

    def held_tensors(self) -> dict[str, list[Tensor]]:
        parameters: list[Tensor] = list(self.root.parameters())
        masters, sums = ([], []) if self._masters is None else self._masters.held_tensors()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return {
            "parameters": [*parameters, *masters, *self.root.buffers()],
            "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None] + sums,
            "optimizer": [value for value in states if isinstance(value, Tensor)],
        }

    def _forward(self, micro_batch: Any) -> Any:
        if self._autocast_dtype is None:
            return self.root(micro_batch)
        with torch.autocast(self._device, self._autocast_dtype):
            return self.root(micro_batch)

    def _in_float32(self) -> AbstractContextManager[None]:
        return nullcontext() if self._masters is None else self._masters.in_float32()

    def _set_training(self, training: bool) -> None:
        if self.root.training != training:
            self.root.train(training)
