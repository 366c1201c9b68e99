"""Processes that do not exist and tensors without numbers, on which real models, strategies and engines run all the
same.

What is sent arrives at once and is forgotten. A few places of PyTorch and DeepSpeed look into tensors that have no
numbers here, or compare what ranks have; they are told what an undisturbed run would see.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from limbeck.errors import LimbeckError
from limbeck.plan.tracker import inside_engine
from limbeck.strategies import deepspeed
from limbeck.strategies.parallel_dims import forget_meshes
from limbeck.strategies.world import World


class _Alike(World):
    """A world whose other processes find what this one finds."""

    def max(self, value: float) -> float:
        return value


@contextmanager
def fake_distributed(count: int, rank: int = 0, *, zero: bool = False) -> Iterator[World]:
    """Rank ``rank`` of ``count`` processes that do not exist, with tensors that have no numbers. zero: DeepSpeed takes
    part.

    Raises LimbeckError in a process that belongs to a process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise LimbeckError("limbeck plan needs a process of its own: this one already belongs to a process group.")
    grouped = count > 1 or zero
    if grouped:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # Both warn of what becomes of numbers, and there are none.
            warnings.simplefilter("ignore")
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
            # Whether a row holds several documents is read from its positions; here each holds one.
            stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None))
            # FSDP2 joins meshes and reads the numbers in them.
            meshes = unset_fake_temporarily()(DeviceMesh.__init__)
            stack.enter_context(patch.object(DeviceMesh, "__init__", meshes))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_Values())
            stack.enter_context(patch.object(nn.Module, "_apply", _apply))
            if zero:
                _let_deepspeed_run(stack)
            yield _Alike(rank, count, torch.device("cpu"))
    finally:
        forget_meshes()
        _clear_sharding_prop_cache()  # which knows the groups by their names
        if zero:
            _forget_deepspeed()
        if dist.is_initialized():
            dist.destroy_process_group()


def _let_deepspeed_run(stack: ExitStack) -> None:
    deepspeed.load_deepspeed()
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3

    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        stack.enter_context(patch.object(module, "assert_ints_same_as_other_ranks", lambda ints: None))
    stack.enter_context(patch.dict(os.environ, LOCAL_RANK="0"))


def _forget_deepspeed() -> None:
    import deepspeed as library

    if library.comm.is_initialized():
        library.comm.destroy_process_group()
    library.comm.comm.cdb = None


_plain_apply = nn.Module._apply


def _apply(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` that keeps the identity of parameters without numbers, which PyTorch's gives up."""
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return _plain_apply(module, change, recurse)
    with torch.no_grad():
        for tensor in tensors:
            changed = change(tensor.data)
            if changed is not tensor.data:
                tensor.data = changed
    return module


_READ: dict[torch.dtype, Any] = {torch.bool: False, torch.uint8: 0, torch.int32: 1, torch.int64: 1}
"""Whether a gradient overflowed or a norm is invalid (no), and the outcome of a vote among stages (one mind)."""


class _Values(TorchDispatchMode):
    """What an engine reads from a tensor: nothing has overflowed, and ranks that vote agree. A model that reads one is
    still refused.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor)
        if asked and inside_engine():
            return _READ.get(args[0].dtype, 0.0)
        return func(*args, **(kwargs or {}))


class FirstChunks(TorchFunctionMode):
    """``torch.chunk`` gives the first chunk in every place: FSDP2 cuts each parameter for all ranks and looks at rank
    0's, and a thousand fake tensors for each would take minutes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.chunk:
            return func(*args, **(kwargs or {}))
        tensor, chunks = args
        dim = (kwargs or {}).get("dim", 0)
        width = min(tensor.shape[dim], -(-tensor.shape[dim] // chunks))
        return [tensor.narrow(dim, 0, width)] * chunks
