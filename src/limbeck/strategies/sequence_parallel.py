"""Sequence parallelism: between its sliced matrices each tensor-parallel rank keeps a part of the rows' time.

Inputs of attention and feed-forward blocks are gathered along time; their outputs are reduce-scattered instead of
all-reduced. Norms and residuals, whose activations are kept for the backward pass, are stored once among the ranks
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
    """Shards the time of one model's rows over the ranks of ``mesh``; the last shard is shorter where that is
    uneven.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._time = 0  # length of the rows in the current pass

    def apply(self, layers: Sequence[nn.Module], entered: Sequence[nn.Module]) -> list[nn.Module]:
        """Shard time from the first of ``layers`` to the last, except inside the modules ``entered``, which see whole
        rows.

        The outputs of ``entered`` must be sharded already. Returns the modules that see shards only, of whose gradients
        every rank computes a part.
        """

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Set again at attention: a recomputation in the backward pass may belong to other rows than the last
            # forward pass.
            positions = kwargs.get("position_ids")
            self._time = self._time if positions is None else positions.shape[-1]

        def shard(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return _changed(args, kwargs, self._shard)

        def unshard(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return _changed(args, kwargs, self._unshard)

        def unshard_output(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return self._unshard(output).to_local()
            return (self._unshard(output[0]).to_local(), *output[1:])

        layers[0].register_forward_pre_hook(shard, with_kwargs=True)
        for module in entered:
            module.register_forward_pre_hook(note, with_kwargs=True)
            module.register_forward_pre_hook(unshard, with_kwargs=True)
        layers[-1].register_forward_hook(unshard_output)
        whole = {part for module in entered for part in module.modules()}
        return [part for layer in layers for part in layer.modules() if part not in whole and _holds_parameters(part)]

    def _shard(self, x: Tensor) -> Tensor:
        """[batch, time, hidden], the same on every rank → this rank's [batch, time / ranks, hidden]."""
        self._time = x.shape[1]
        whole = DTensor.from_local(x, self._mesh, [Replicate()], run_check=False)
        sharded: Tensor = whole.redistribute(placements=[Shard(1)]).to_local()
        return sharded

    def _unshard(self, x: Tensor) -> DTensor:
        """The inverse; as a DTensor, in which the gradients of several matrices are added up before they are
        exchanged.
        """
        batch, _, hidden = x.shape
        shape, stride = torch.Size((batch, self._time, hidden)), (self._time * hidden, hidden, 1)
        x = x.contiguous()
        parts = DTensor.from_local(x, self._mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
        return parts.redistribute(placements=[Replicate()])


def _changed(args: Any, kwargs: Any, change: Any) -> tuple[Any, Any]:
    """The arguments of a module with its hidden states changed, which are the first or go by their name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
