"""States of models and optimizers: what this rank holds of them, and loading into any number of ranks.

A state is a flat dict under the parameters' plain names. Its tensors do not depend on how many ranks held the model, so
that a run can resume on another number of them.
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
from limbeck.strategies.shards import Shard, Sliceable, local_box, shard_of, whole_box

_PARTIAL = StateDictOptions(strict=False)  # checkpoints do not contain frozen parameters


def iter_model(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and full tensors of the state under ``prefix`` (removed), one at a time. Every process must exhaust it."""
    for name, value in get_model_state_dict(model).items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), whole(value)


def model_shards(model: nn.Module, names: Collection[str]) -> dict[str, list[Shard]]:
    """What this rank holds of the parameters ``names``."""
    return {name: [shard_of(value)] for name, value in get_model_state_dict(model).items() if name in names}


def load_model_state(model: nn.Module, state: Mapping[str, Sliceable]) -> None:
    """Load a whole state, given in every process, into a model however it is sharded; reads this rank's part."""
    like: dict[str, Any] = get_model_state_dict(model)
    local: dict[str, Any] = {name: shard_like(tensor, like[name]) for name, tensor in state.items()}
    set_model_state_dict(model, local, options=_PARTIAL)


def optimizer_shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Shard]]:
    """What this rank holds of the optimizer's tensors, as ``<parameter>|<entry>``."""
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    return {
        f"{name}|{key}": [shard_of(torch.as_tensor(value))]
        for name, values in state.items()
        for entry, given in values.items()
        for key, value in _plain_tensors(entry, given).items()
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Sliceable]) -> None:
    """Load whole tensors, named as in ``optimizer_shards``, in every process; learning rates stay as they are."""
    like: dict[str, Any] = get_model_state_dict(model)
    given: dict[str, dict[str, Sliceable]] = {}
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


def _restored(entry: str, fresh: Any, entries: Mapping[str, Sliceable], parameter: Tensor) -> Any:
    """The inverse of ``_plain_tensors``, in the type and the sharding of the entry's ``fresh`` value."""
    if is_traceable_wrapper_subclass(fresh) and not isinstance(fresh, DTensor):
        names, context = fresh.__tensor_flatten__()
        inner = {name: _whole(entries[f"{entry}.{name}"]).to(getattr(fresh, name).device) for name in names}
        return type(fresh).__tensor_unflatten__(inner, context, fresh.size(), fresh.stride())
    value = entries[entry]
    if not isinstance(fresh, Tensor):
        return _whole(value).item()
    return shard_like(value, parameter) if tuple(value.shape) == tuple(parameter.shape) else _whole(value)


def _whole(value: Sliceable) -> Tensor:
    return value[whole_box(value.shape)]


def whole(value: Any) -> Tensor:
    """The full tensor of a sharded one. Collective for DTensors."""
    tensor: Tensor = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
    return tensor.detach()


def shard_like(full: Sliceable, like: Tensor) -> Tensor:
    """This process's shard of ``full``, placed as ``like`` is."""
    part = full[local_box(like)]
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.to(like.device).contiguous(),
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
        run_check=False,
    )
