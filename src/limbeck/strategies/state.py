"""Whole states of models and optimizers, gathered from and scattered to any number of processes.

A state is a flat dict of CPU tensors under the parameters' plain names: the same whether one process held the model or many,
which is what lets a run resume on another number of them.
"""

from __future__ import annotations

from collections.abc import Mapping
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

from limbeck.strategies.parallel_dims import TENSOR

_SOME = StateDictOptions(strict=False)  # frozen parameters are in no checkpoint of a run


def gather_model(model: nn.Module, *, keep: bool) -> dict[str, Any]:
    """The whole model on the CPU of the processes that ``keep`` it; empty elsewhere. Every process must call it."""
    return _gathered(get_model_state_dict(model), keep)


def scatter_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state, given in every process, into a model however it is spread."""
    like: dict[str, Any] = get_model_state_dict(model)
    set_model_state_dict(model, {name: _spread(tensor, like[name]) for name, tensor in state.items()}, options=_SOME)


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Tensor]:
    """The optimizer's tensors as ``<parameter>|<entry>`` on the CPU of the processes that ``keep`` them. Every process must
    call it."""
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    entries = {f"{name}|{entry}": value for name, values in state.items() for entry, value in values.items()}
    return _gathered(entries, keep)


def scatter_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``gather_optimizer``, given the tensors in every process; learning rates stay as they are."""
    like: dict[str, Any] = get_model_state_dict(model)
    state: dict[str, Any] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit("|", 1)
        parameter = like[name]
        state.setdefault(name, {})[entry] = _spread(value, parameter) if value.shape == parameter.shape else value
    options = StateDictOptions()
    # get_… first: it makes the optimizer's (empty) state exist, so that its groups are known under plain names.
    groups = get_optimizer_state_dict(model, optimizer, options=options)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)


def _gathered(tensors: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """One after the other, so that no device holds more than one whole tensor beside its shards."""
    whole = {}
    for name, value in tensors.items():
        tensor = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
        if keep:
            whole[name] = tensor.detach().cpu()
    return whole


def _spread(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of ``whole``, spread as ``like`` is.

    Not by ``distribute_tensor``, which cannot (torch 2.13) divide unevenly what FSDP and tensor parallelism share.
    """
    if not isinstance(like, DTensor):
        return whole
    mesh, part = like.device_mesh, whole.to(like.device)
    names = mesh.mesh_dim_names or ()
    for i in sorted(range(mesh.ndim), key=lambda i: names[i] != TENSOR):  # FSDP divides a tensor rank's slice
        placement = like.placements[i]
        if not placement.is_replicate():
            dim, rank = placement.dim, mesh.get_local_rank(i)  # type: ignore[attr-defined]
            parts = part.chunk(mesh.size(i), dim)
            part = parts[rank] if rank < len(parts) else part.narrow(dim, 0, 0)
    return DTensor.from_local(
        part.contiguous(), mesh, like.placements, shape=whole.shape, stride=whole.stride(), run_check=False
    )
