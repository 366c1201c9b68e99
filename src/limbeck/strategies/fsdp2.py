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
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from limbeck.errors import LimbeckError
from limbeck.strategies.parallel_dims import TENSOR, Layout
from limbeck.strategies.world import World

M = TypeVar("M", bound=nn.Module)

_STAGE = "stage"
"""The mesh dimension over which layers are divided; each stage shards its own among its ranks."""


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


def shard(
    root: M, layers: Sequence[nn.Module], world: World, options: Fsdp2, whole_mesh: DeviceMesh | None = None
) -> M:
    """``root`` with each of ``layers`` and the rest of it sharded in place; unchanged when the process is alone.

    whole_mesh: what ``make_mesh`` gave, if its tensor dimension is in use already.
    """
    if world.size == 1:
        return root
    mesh = make_mesh(world, options, Layout()) if whole_mesh is None else whole_mesh
    mesh = mesh[tuple(name for name in mesh.mesh_dim_names or () if name not in (TENSOR, _STAGE))]
    policy = MixedPrecisionPolicy(param_dtype=options.param_dtype, reduce_dtype=options.reduce_dtype)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=options.reshard_after_forward)
    # The head is read where the root runs, so the root's own parameters stay gathered until its backward is done.
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return root


def ranks_of_a_copy(ranks: int, options: Fsdp2, tensor: int = 1) -> int:
    """Over how many of ``ranks`` (each, with ``tensor``, a group of so many) one copy of the model is spread.

    Raises LimbeckError if that does not come out even.
    """
    size = 1 if options.replicate else options.fsdp_size
    if not options.replicate and (size <= 1 or size >= ranks):
        return ranks
    if ranks % size:
        of = "processes" if tensor == 1 else f"groups of {tensor} tensor ranks"
        raise LimbeckError(
            f"strategy_config.fsdp_size = {size} does not divide the {ranks} {of}; use a divisor, or 0 for all."
        )
    return size


@unset_fake_temporarily()  # the numbers in a mesh are read, also where a plan's tensors have none
def make_mesh(world: World, options: Fsdp2, layout: Layout) -> DeviceMesh:
    """The processes as stages × copies × shards × tensor ranks, without the dimensions that are not in use."""
    others = world.size // (layout.tensor * layout.pipeline)
    size = ranks_of_a_copy(others, options, layout.tensor)
    dims = {_STAGE: layout.pipeline, "replicate": others // size, "shard": size, TENSOR: layout.tensor}
    used = {name: count for name, count in dims.items() if count > 1 or name == "shard"}
    numbered = torch.arange(world.size).view(-1, layout.pipeline, layout.context, layout.tensor)
    ranks = numbered.transpose(0, 1).reshape(tuple(used.values()))
    return DeviceMesh(world.device.type, ranks, mesh_dim_names=tuple(used))
