"""What a piece of PyTorch code holds, computes and sends, seen from its operators: live bytes, FLOPs, collectives.

Works on real tensors and on fake ones (sizes without memory) alike, which is how a prediction is checked against a run.
Buffers that an operator makes and frees inside itself are out of sight. Knows tensors; knows nothing of models.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

GATHERED = "gathered"
"""The tag of what FSDP2 makes: gathered parameters, buffers of its collectives, reduced gradients."""

_aten = torch.ops.aten
_ATTENTION: dict[Any, tuple[Callable[..., int], int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (sdpa_flop_count, 3),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (sdpa_backward_flop_count, 4),
}
_COLLECTIVES = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "recv_": "receive",
}
_SILENT = (
    "send",
    "barrier",
    "wait_tensor",
    "wrap_tensor_autograd",
    "_wrap_tensor_autograd",
)  # or counted at the other end


def inside_engine() -> bool:
    """Whether the operator that is running was called by FSDP2, DeepSpeed or PyTorch's pipelining itself, and not by
    the model that these run.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith(_OF_MODELS) or "/transformers/" in name:
            return False
        if any(part in name for part in _OF_ENGINES):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_OF_ENGINES = ("/_fully_shard/", "/deepspeed/", "/distributed/pipelining/")
_OF_MODELS = ("/autograd/graph.py", "/train/student.py", "/objectives/sizes.py", "/deepspeed/runtime/zero/linear.py")
"""Of the last, DeepSpeed runs the products of ZeRO-3 in place of PyTorch; by the first a backward pass is run."""


class Tracker(TorchDispatchMode):
    """Inside ``with tracker:`` every storage is counted from the operator that makes it to the moment that it is freed.

    live: bytes by tag; peak: the same when their sum was largest; most: each tag at its own most. flops: of matrix
    products and attention, as ``torch.utils.flop_counter`` counts them. sent: for each collective and the ranks of its
    group, the bytes of its larger side.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.flops = 0
        self.sent: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._tag = "other"
        self._known: dict[int, tuple[Any, str, int, int]] = {}  # by the storage's id: weak reference, tag, bytes, birth
        self._total = self._highest = self._clock = self._highest_at = 0
        self._resize: Callable[..., Any] | None = None

    @contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """What is made inside belongs to ``tag``."""
        before, self._tag = self._tag, tag
        try:
            yield
        finally:
            self._tag = before

    def add(self, tensors: Iterable[Tensor], tag: str) -> None:
        """Count ``tensors`` that were made before, or call what they hold by another tag, also at the peak."""
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            known = self._forget(id(storage))
            self._count(storage, tag)
            if known is not None:
                before, size, birth = known
                self._known[id(storage)] = (*self._known[id(storage)][:3], birth)
                if birth <= self._highest_at:
                    self.peak[before] -= size
                    self.peak[tag] += size

    def reset(self) -> None:
        """Look for the largest sum, and count what is computed and sent, from now on."""
        self._highest, self._highest_at, self.peak = self._total, self._clock, self.live.copy()
        self.most = self.live.copy()
        self.flops = 0
        self.sent.clear()

    def __enter__(self) -> Tracker:
        # Resizing a storage, which is how FSDP2 frees and takes its gathered parameters, is no operator.
        self._resize = resize = torch.UntypedStorage.resize_

        def watched(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            known = self._forget(id(storage))
            self._count(storage, known[0] if known else self._maker())
            return result

        torch.UntypedStorage.resize_ = watched  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._resize is not None:
            torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it turn into operators on what this rank holds
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._known:
                    self._count(storage, self._maker())
        packet = func._overloadpacket
        if packet in _ATTENTION:
            count, inputs = _ATTENTION[packet]
            self.flops += count(*(each.shape for each in args[:inputs]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif "c10d" in func.namespace and packet.__name__ not in _SILENT:
            larger = max(_bytes(result), *(_bytes(each) for each in args[:2]))
            self.sent[_COLLECTIVES[packet.__name__], _ranks(args)] += larger
        return result

    def _maker(self) -> str:
        return GATHERED if inside_engine() else self._tag

    def _count(self, storage: Any, tag: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._clock += 1
        self._known[key] = (weakref.ref(storage, lambda _: self._forget(key)), tag, size, self._clock)
        self.live[tag] += size
        self.most[tag] = max(self.most[tag], self.live[tag])
        self._total += size
        if self._total > self._highest:
            self._highest, self._highest_at, self.peak = self._total, self._clock, self.live.copy()

    def _forget(self, key: int) -> tuple[str, int, int] | None:
        """The tag, the bytes and the birth of a storage that is counted no longer."""
        if key not in self._known:
            return None
        _, tag, size, birth = self._known.pop(key)
        self.live[tag] -= size
        self._total -= size
        return tag, size, birth


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tree_leaves(tensors) if isinstance(each, Tensor))


def _ranks(args: Any) -> tuple[int, ...]:
    """Of the process group that is among the arguments of a collective, as an object or by its name."""
    for leaf in reversed(tree_leaves(args)):
        if isinstance(leaf, str) and leaf.isdigit():
            return tuple(get_process_group_ranks(_resolve_process_group(leaf)))  # type: ignore[arg-type]
        if isinstance(leaf, Tensor | int | float | str | bool) or leaf is None:
            continue
        try:
            return tuple(get_process_group_ranks(ProcessGroup.unbox(getattr(leaf, "real_obj", leaf))))
        except (RuntimeError, TypeError):  # a reduction's name, say
            continue
    raise AssertionError("a collective has a process group")
