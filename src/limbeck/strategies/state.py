"""Whole states of models and optimizers, gathered from and loaded into any number of processes.

A state is a flat dict of CPU tensors under the parameters' plain names. It does not depend on how many processes held
the model, so that a run can resume on another number of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from limbeck.strategies.parallel_dims import TP

_PARTIAL = StateDictOptions(strict=False)  # checkpoints do not contain frozen parameters


def iter_model(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and full tensors of the state under ``prefix`` (removed), one at a time. Every process must exhaust it."""
    for name, value in get_model_state_dict(model).items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), whole(value)


def gather_model(model: nn.Module, names: Collection[str], *, keep: bool) -> dict[str, Tensor]:
    """The parameters ``names``, whole, on the CPU of the processes that ``keep`` them. Every process must call it."""
    state = get_model_state_dict(model)
    return gather_tensors({name: value for name, value in state.items() if name in names}, keep)


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state, given in every process, into a model however it is sharded."""
    like: dict[str, Any] = get_model_state_dict(model)
    local: dict[str, Any] = {name: shard_like(tensor, like[name]) for name, tensor in state.items()}
    set_model_state_dict(model, local, options=_PARTIAL)


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Tensor]:
    """The optimizer's tensors as ``<parameter>|<entry>`` on the CPU of the processes that ``keep`` them. Collective."""
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    entries = {f"{name}|{entry}": value for name, values in state.items() for entry, value in values.items()}
    return gather_tensors(entries, keep)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``gather_optimizer``, given the tensors in every process; learning rates stay as they are."""
    like: dict[str, Any] = get_model_state_dict(model)
    state: dict[str, Any] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit("|", 1)
        parameter = like[name]
        state.setdefault(name, {})[entry] = shard_like(value, parameter) if value.shape == parameter.shape else value
    options = StateDictOptions()
    # get_… first: it creates the optimizer's empty state, so that its groups are known under plain names.
    groups = get_optimizer_state_dict(model, optimizer, options=options)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)


def whole(value: Any) -> Tensor:
    """The full tensor of a sharded one. Collective for DTensors."""
    tensor: Tensor = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
    return tensor.detach()


def gather_tensors(tensors: Mapping[str, Any], keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU of the processes that ``keep`` them. Every process must call it.

    One after the other, so that no device holds more than one whole tensor beside its shards.
    """
    gathered = {}
    for name, value in tensors.items():
        tensor = whole(value)
        if keep:
            gathered[name] = tensor.cpu()
    return gathered


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This process's shard of ``full``, placed as ``like`` is.

    ``distribute_tensor`` (torch 2.13) cannot shard unevenly over a dimension that FSDP and tensor parallelism share.
    """
    if not isinstance(like, DTensor):
        return full
    mesh, part = like.device_mesh, full.to(like.device)
    names = mesh.mesh_dim_names or ()
    for i in sorted(range(mesh.ndim), key=lambda i: names[i] != TP):  # FSDP shards a tensor-parallel rank's slice
        placement = like.placements[i]
        if not placement.is_replicate():
            dim, rank = placement.dim, mesh.get_local_rank(i)  # type: ignore[attr-defined]
            parts = part.chunk(mesh.size(i), dim)
            part = parts[rank] if rank < len(parts) else part.narrow(dim, 0, 0)
    return DTensor.from_local(
        part.contiguous(), mesh, like.placements, shape=full.shape, stride=full.stride(), run_check=False
    )
