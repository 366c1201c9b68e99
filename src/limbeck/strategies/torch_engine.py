"""How a root module is stepped, whatever spreads it.

The loop asks an engine for forward, backward and step and for whole states; it never asks what lies beneath. ``TorchEngine``
steps a module that is alone or sharded by FSDP2; ``strategies/deepspeed.py`` steps one with DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from limbeck.strategies.state import gather_model, gather_optimizer, scatter_model, scatter_optimizer
from limbeck.strategies.world import World


class Engine(Protocol):
    """A trained module. Every process must call every method, in the same order."""

    optimizer: torch.optim.Optimizer
    """Whose learning rates a schedule sets."""

    def __call__(self, *inputs: Any) -> Any:
        """The root's forward pass."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a scalar loss, not divided by anything; ``last``: the step's last micro-batch."""

    def step(self) -> Tensor:
        """Average gradients over the processes, clip, step and forget them; their norm before clipping."""

    def gather_model(self) -> dict[str, Any]:
        """The whole model in float32 where it is trained, on the CPU of the main process; nothing elsewhere."""

    def scatter_model(self, state: Mapping[str, Tensor]) -> None:
        """Load whole tensors, given in every process, over those of the same names."""

    def gather_optimizer(self) -> dict[str, Tensor]:
        """The optimizer's tensors as ``<parameter>|<entry>`` on the CPU of the main process; nothing elsewhere."""

    def scatter_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``gather_optimizer``, given the tensors in every process; learning rates stay as they are."""

    def scaler_state(self) -> dict[str, Any]:
        """Of the scaling of losses in fp16, as JSON values; empty without."""

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``scaler_state``; nothing happens unless both scale."""


class TorchEngine:
    """PyTorch's own optimizer over a module that is alone in its process, or sharded by ``shard``.

    compute_dtype: what layers compute in when that is not the parameters' own. Several ranks take FSDP's ``param_dtype`` for
    it; one alone computes in autocast over the same masters. max_norm: gradients are clipped to it; 0 is off.
    """

    def __init__(
        self,
        root: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        compute_dtype: torch.dtype | None = None,
        max_norm: float = 0.0,
    ) -> None:
        self.root, self.optimizer, self.max_norm = root, optimizer, max_norm
        self._device, self._is_main = world.device.type, world.is_main
        self._away: list[tuple[dict[str, Any], str]] = []  # of the optimizer's state: what is on the host for now
        self._autocast_dtype = compute_dtype if world.size == 1 else None
        self._scaler = torch.amp.GradScaler(self._device, enabled=compute_dtype is torch.float16)

    def __call__(self, *inputs: Any) -> Any:
        if self._autocast_dtype is None:
            return self.root(*inputs)
        with torch.autocast(self._device, self._autocast_dtype):
            return self.root(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._scaler.scale(loss).backward()

    def step(self) -> Tensor:
        self._scaler.unscale_(self.optimizer)
        norm = self.gradient_norm()
        clip_gradients(self.root.parameters(), self.max_norm, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gradient_norm(self) -> Tensor:
        """The gradients' norm over all processes."""
        return gradient_norm(self.root.parameters())

    def offload(self) -> None:
        """Move parameters, buffers and the optimizer's state to the host, between steps; on a CPU they are there already."""
        self.root.to("cpu")
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.device.type == self._device != "cpu":
                    state[key] = value.to("cpu")
                    self._away.append((state, key))
        torch.cuda.empty_cache()

    def reload(self) -> None:
        """The inverse of ``offload``."""
        self.root.to(self._device)
        while self._away:
            state, key = self._away.pop()
            state[key] = state[key].to(self._device)

    def gather_model(self) -> dict[str, Any]:
        return gather_model(self.root, keep=self._is_main)

    def scatter_model(self, state: Mapping[str, Tensor]) -> None:
        scatter_model(self.root, state)

    def gather_optimizer(self) -> dict[str, Tensor]:
        return gather_optimizer(self.root, self.optimizer, keep=self._is_main)

    def scatter_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        scatter_optimizer(self.root, self.optimizer, tensors)

    def scaler_state(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        if self._scaler.is_enabled() and "growth_factor" in state:
            self._scaler.load_state_dict(dict(state))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of their gradients over all processes that share them, as a device scalar."""
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in alike if p.grad is not None]) for alike in _alike(parameters)
    ]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, total: Tensor) -> None:
    """Scale gradients whose norm is ``total`` down to ``max_norm`` if that is above; 0 is off."""
    for alike in _alike(parameters):
        torch.nn.utils.clip_grads_with_norm_(alike, max_norm if max_norm > 0 else float("inf"), total)


def _alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those with a gradient by their mesh, since only tensors of one mesh can be added."""
    alike: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            alike.setdefault(mesh, []).append(parameter)
    return list(alike.values())
