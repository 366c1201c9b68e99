"""Sequence parallelism: between its sliced matrices each tensor rank keeps a stretch of the rows' time, not all of it.

What enters attention or a feed-forward block is gathered; what leaves it is summed and divided in one exchange instead of being
summed for everybody. Norms and residuals, whose activations are kept for the backward pass, are held once among the ranks
instead of on each. Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


class SequenceParallel:
    """The rows of one model in stretches of time over the ranks of ``mesh``, the last one shorter where that is uneven."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._time = 0  # of the whole rows that are under way

    def divide_between(self, layers: Sequence[nn.Module], entered: Sequence[nn.Module]) -> list[nn.Module]:
        """Divide time from the first of ``layers`` to the last, but for the modules ``entered``, which see whole rows.

        What leaves those must be divided already. Returns the modules that see stretches alone, so that every rank forms a
        part of their gradients.
        """

        def note(module: nn.Module, args: Any, named: Any) -> None:
            # Attention tells it anew: what is recomputed for a backward pass may belong to other rows than the last forward.
            positions = named.get("position_ids")
            self._time = self._time if positions is None else positions.shape[-1]

        def divide(module: nn.Module, args: Any, named: Any) -> Any:
            return _changed(args, named, self._divide)

        def join(module: nn.Module, args: Any, named: Any) -> Any:
            return _changed(args, named, self._join)

        def join_output(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return self._join(output).to_local()
            return (self._join(output[0]).to_local(), *output[1:])

        layers[0].register_forward_pre_hook(divide, with_kwargs=True)
        for module in entered:
            module.register_forward_pre_hook(note, with_kwargs=True)
            module.register_forward_pre_hook(join, with_kwargs=True)
        layers[-1].register_forward_hook(join_output)
        whole = {part for module in entered for part in module.modules()}
        return [part for layer in layers for part in layer.modules() if part not in whole and _holds_parameters(part)]

    def _divide(self, x: Tensor) -> Tensor:
        """[batch, time, hidden], alike on every rank → this rank's [batch, stretch, hidden]."""
        self._time = x.shape[1]
        whole = DTensor.from_local(x, self._mesh, [Replicate()], run_check=False)
        divided: Tensor = whole.redistribute(placements=[Shard(1)]).to_local()
        return divided

    def _join(self, x: Tensor) -> DTensor:
        """The inverse; as a DTensor, in which the gradients of several matrices are added up before they are exchanged."""
        batch, _, hidden = x.shape
        shape, stride = torch.Size((batch, self._time, hidden)), (self._time * hidden, hidden, 1)
        x = x.contiguous()
        parts = DTensor.from_local(x, self._mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
        return parts.redistribute(placements=[Replicate()])


def _changed(args: Any, named: Any, change: Any) -> tuple[Any, Any]:
    """The arguments of a module with its hidden states changed, which are the first or go by their name."""
    if args:
        return (change(args[0]), *args[1:]), named
    return args, {**named, "hidden_states": change(named["hidden_states"])}


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
