"""FSDP2: parameters, gradients and optimizer state sharded over the processes by PyTorch's ``fully_shard``.

The module's own code does not change: it is applied from outside, layer by layer and then to the root, so parameters are
gathered and gradients reduced by the engine's hooks. Alone in a process there is nothing to shard and nothing is wrapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from limbeck.errors import LimbeckError
from limbeck.strategies.world import World

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Fsdp2:
    """What can be chosen.

    fsdp_size: processes that share one copy; 0, 1 or the world's size shards over all, less makes HSDP (copies side by side).
    replicate: keep a whole copy in every process and only average gradients. param_dtype: what layers compute in; None keeps
    the parameters' own. reduce_dtype: what gradients are summed in. reshard_after_forward: free gathered layers until the
    backward pass needs them again.
    """

    fsdp_size: int = 0
    replicate: bool = False
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool = True


def shard(root: M, layers: Sequence[nn.Module], world: World, options: Fsdp2) -> M:
    """``root`` with each of ``layers`` and the rest of it sharded in place; unchanged when the process is alone."""
    if world.size == 1:
        return root
    mesh = _mesh(world, options)
    policy = MixedPrecisionPolicy(param_dtype=options.param_dtype, reduce_dtype=options.reduce_dtype)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=options.reshard_after_forward)
    # The head is read where the root runs, so the root's own parameters stay gathered until its backward is done.
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return root


def ranks_of_a_copy(ranks: int, options: Fsdp2) -> int:
    """Over how many of ``ranks`` one copy of the model is spread; raises LimbeckError if that does not come out even."""
    size = 1 if options.replicate else options.fsdp_size
    if not options.replicate and (size <= 1 or size >= ranks):
        return ranks
    if ranks % size:
        raise LimbeckError(
            f"strategy_config.fsdp_size = {size} does not divide the {ranks} processes; use a divisor, or 0 for all."
        )
    return size


def _mesh(world: World, options: Fsdp2) -> DeviceMesh:
    kind, size = world.device.type, ranks_of_a_copy(world.size, options)
    if size == world.size:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (world.size // size, size), mesh_dim_names=("replicate", "shard"))
