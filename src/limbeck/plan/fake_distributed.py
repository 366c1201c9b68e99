"""One rank of a process group without other processes, on tensors that have sizes and no values.

Real models, strategies and engines run here. A collective returns at once and transfers nothing. PyTorch and DeepSpeed
read a few values, such as whether a gradient has overflowed; they get those of a run without faults.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
from transformers.integrations import moe

from limbeck.errors import LimbeckError
from limbeck.models import compile as compilation
from limbeck.plan.compiled_layers import SimulatedCompiler
from limbeck.plan.tracker import ACTIVATIONS, GATHERED, current_tag, with_tag
from limbeck.strategies.base import LibraryFunctions
from limbeck.strategies.parallel_dims import forget_meshes
from limbeck.strategies.world import World


class _SameEverywhere(World):
    """A world in which every process has the same values."""

    def max(self, value: float) -> float:
        return value


@contextmanager
def fake_distributed(
    ranks: int, rank: int, libraries: Sequence[AbstractContextManager[LibraryFunctions]] = ()
) -> Iterator[World]:
    """Rank ``rank`` of ``ranks`` processes that do not exist, with fake tensors.

    What the functions of the ``libraries`` allocate is tagged ``gathered``, and what a backward pass allocates outside of
    them ``activations``.

    Args:
        ranks: number of processes.
        rank: which of them this is.
        libraries: ``Strategy.simulate`` of the strategies that are used.

    Raises:
        LimbeckError: in a process that belongs to a process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise LimbeckError("a plan needs a process of its own; this one already belongs to a process group.")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # Libraries warn about values, and there are none.
            warnings.simplefilter("ignore")
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
            # Whether a row holds several documents is read from the values of its positions; here each holds one.
            stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None))
            # Fake tensors have PyTorch's product of groups in bfloat16 only; the substitute has the same sizes.
            grouped = lambda product, weight, offsets: weight.dtype is torch.bfloat16  # noqa: E731
            stack.enter_context(patch.object(moe, "_can_use_grouped_mm", grouped))
            # FSDP2 joins meshes and reads the ranks in them.
            meshes = unset_fake_temporarily()(DeviceMesh.__init__)
            stack.enter_context(patch.object(DeviceMesh, "__init__", meshes))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_LibraryReads())
            stack.enter_context(patch.object(nn.Module, "_apply", _apply))
            stack.enter_context(patch.object(compilation, "compile_function", SimulatedCompiler()))
            backward = with_tag(ACTIVATIONS, torch.autograd.backward)
            stack.enter_context(patch.object(torch.autograd, "backward", backward))
            for library in libraries:
                for owner, name in stack.enter_context(library):
                    function = with_tag(GATHERED, getattr(owner, name))
                    stack.enter_context(patch.object(owner, name, function))
            yield _SameEverywhere(rank, ranks, torch.device("cpu"))
    finally:
        forget_meshes()
        _clear_sharding_prop_cache()  # its keys contain process groups
        if dist.is_initialized():
            dist.destroy_process_group()


_plain_apply = nn.Module._apply


def _apply(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` that keeps the identity of fake parameters, which PyTorch's does not."""
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
"""No gradient has overflowed, no norm is invalid, and all pipeline stages agree."""


class _LibraryReads(TorchDispatchMode):
    """The values that a strategy's library reads from fake tensors. A model that reads one is refused by PyTorch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor)
        if reads and current_tag() == GATHERED:
            return _READ.get(args[0].dtype, 0.0)
        return func(*args, **(kwargs or {}))


class FirstChunks(TorchFunctionMode):
    """``torch.chunk`` that returns the first chunk in every place.

    FSDP2 cuts each parameter for all ranks and keeps the first one for rank 0. A thousand fake tensors for each
    parameter would take minutes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.chunk:
            return func(*args, **(kwargs or {}))
        tensor, chunks = args
        dim = (kwargs or {}).get("dim", 0)
        width = min(tensor.shape[dim], -(-tensor.shape[dim] // chunks))
        return [tensor.narrow(dim, 0, width)] * chunks
