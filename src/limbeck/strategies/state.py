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
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from limbeck.errors import LimbeckError
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
    return _gather({name: value for name, value in state.items() if name in names}, keep)


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state, given in every process, into a model however it is sharded."""
    like: dict[str, Any] = get_model_state_dict(model)
    local: dict[str, Any] = {name: _shard_like(tensor, like[name]) for name, tensor in state.items()}
    set_model_state_dict(model, local, options=_PARTIAL)


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Tensor]:
    """The optimizer's tensors as ``<parameter>|<entry>`` on the CPU of the processes that ``keep`` them. Collective."""
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    entries = {
        f"{name}|{key}": value
        for name, values in state.items()
        for entry, given in values.items()
        for key, value in _plain_tensors(entry, given).items()
    }
    return _gather(entries, keep)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``gather_optimizer``, given the tensors in every process; learning rates stay as they are."""
    like: dict[str, Any] = get_model_state_dict(model)
    given: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit("|", 1)
        given.setdefault(name, {})[entry] = value
    options = StateDictOptions()
    # get_… creates the optimizer's empty state, so that its groups and entries are known under plain names.
    empty: Any = get_optimizer_state_dict(model, optimizer, options=options)
    state: dict[str, Any] = {}
    for name, entries in given.items():
        fresh = empty["state"].get(name, entries)
        if {key for entry in fresh for key in _plain_tensors(entry, fresh[entry])} != entries.keys():
            raise LimbeckError(
                "the checkpoint has the state of another optimizer; set student.training_args.optimizer_name as it was in the "
                "run of the checkpoint."
            )
        state[name] = {entry: _restored(entry, value, entries, like[name]) for entry, value in fresh.items()}
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": empty["param_groups"]}, options=options)


def _plain_tensors(entry: str, value: Any) -> dict[str, Any]:
    """An entry of an optimizer's state as plain tensors: those inside a quantised tensor, such as torchao's, have a suffix."""
    if not is_traceable_wrapper_subclass(value) or isinstance(value, DTensor):
        return {entry: value}
    names, _ = value.__tensor_flatten__()
    return {f"{entry}.{name}": getattr(value, name) for name in names}


def _restored(entry: str, fresh: Any, entries: Mapping[str, Tensor], parameter: Tensor) -> Any:
    """The inverse of ``_plain_tensors``, in the type and the sharding of the entry's ``fresh`` value."""
    if is_traceable_wrapper_subclass(fresh) and not isinstance(fresh, DTensor):
        names, context = fresh.__tensor_flatten__()
        inner = {name: entries[f"{entry}.{name}"].to(getattr(fresh, name).device) for name in names}
        return type(fresh).__tensor_unflatten__(inner, context, fresh.size(), fresh.stride())
    value = entries[entry]
    if not isinstance(fresh, Tensor):
        return value.item()
    return _shard_like(value, parameter) if value.shape == parameter.shape else value


def whole(value: Any) -> Tensor:
    """The full tensor of a sharded one. Collective for DTensors."""
    tensor: Tensor = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
    return tensor.detach()


def _gather(tensors: Mapping[str, Any], keep: bool) -> dict[str, Tensor]:
    """One after the other, so that no device holds more than one whole tensor beside its shards."""
    gathered = {}
    for name, value in tensors.items():
        tensor = whole(value)
        if keep:
            gathered[name] = tensor.cpu()
    return gathered


def _shard_like(full: Tensor, like: Tensor) -> Tensor:
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
