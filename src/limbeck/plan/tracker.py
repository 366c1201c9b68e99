"""Live bytes, FLOPs and collectives of PyTorch code, counted from the operators that it runs.

Works on real tensors and on fake ones (which have sizes and no memory), so that a prediction can be compared with a
run. Buffers that an operator allocates and frees inside itself are not seen. Knows tensors; knows nothing of models.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

F = TypeVar("F", bound=Callable[..., Any])

ACTIVATIONS = "activations"
"""The tag of what a trained model's forward and backward pass allocate."""

GATHERED = "gathered"
"""The tag of what the library of a strategy allocates: gathered parameters, buffers of its collectives, reduced
gradients.
"""

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
_NOT_COUNTED = (  # they send nothing, or are counted where they are received
    "send",
    "barrier",
    "wait_tensor",
    "wrap_tensor_autograd",
    "_wrap_tensor_autograd",
)

_tags = ["other"]  # not a context variable: autograd may run parts of a backward pass on another thread


def current_tag() -> str:
    """The tag of what is allocated now: that of the innermost ``tagged`` context."""
    return _tags[-1]


@contextmanager
def tagged(tag: str) -> Iterator[None]:
    """Gives ``tag`` to what is allocated inside."""
    _tags.append(tag)
    try:
        yield
    finally:
        _tags.pop()


def with_tag(tag: str, function: F) -> F:
    """``function``, whose allocations get ``tag``."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with tagged(tag):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


class Tracker(TorchDispatchMode):
    """Inside ``with tracker:`` every storage is counted from the operator that allocates it until it is freed.

    live: bytes by tag. peak: the same when their sum was largest. most: each tag at its own maximum. flops: of matrix
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
        self._known: dict[int, tuple[Any, str, int, int]] = {}  # by the storage's id: weak reference, tag, bytes, birth
        self._total = self._highest = self._clock = self._highest_at = 0
        self._resize: Callable[..., Any] | None = None

    def add(self, tensors: Iterable[Tensor], tag: str) -> None:
        """Count ``tensors`` that were allocated before, or change the tag of those that are counted, also at the
        peak.
        """
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
        """Start to look for the largest sum, and to count what is computed and sent, from now on."""
        self._highest, self._highest_at, self.peak = self._total, self._clock, self.live.copy()
        self.most = self.live.copy()
        self.flops = 0
        self.sent.clear()

    def __enter__(self) -> Tracker:
        # FSDP2 frees and allocates its gathered parameters by resizing their storage, which is no operator.
        self._resize = resize = torch.UntypedStorage.resize_

        def counted_resize(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            known = self._forget(id(storage))
            self._count(storage, known[0] if known else current_tag())
            return result

        torch.UntypedStorage.resize_ = counted_resize  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._resize is not None:
            torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it runs again as operators on what this rank holds
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._known:
                    self._count(storage, current_tag())
        packet = func._overloadpacket
        if packet in _ATTENTION:
            count, inputs = _ATTENTION[packet]
            self.flops += count(*(each.shape for each in args[:inputs]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif "c10d" in func.namespace and packet.__name__ not in _NOT_COUNTED:
            larger = max(_bytes(result), *(_bytes(each) for each in args[:2]))
            self.sent[_COLLECTIVES[packet.__name__], _ranks(args)] += larger
        return result

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
        """The tag, bytes and birth of a storage that is no longer counted."""
        if key not in self._known:
            return None
        _, tag, size, birth = self._known.pop(key)
        self.live[tag] -= size
        self._total -= size
        return tag, size, birth


def local(tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors`` on this rank, each counted once."""
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tree_leaves(tensors) if isinstance(each, Tensor))


def _ranks(args: Any) -> tuple[int, ...]:
    """The ranks of the process group among the arguments of a collective, which is an object or a name."""
    for leaf in reversed(tree_leaves(args)):
        if isinstance(leaf, str) and leaf.isdigit():
            return tuple(get_process_group_ranks(_resolve_process_group(leaf)))  # type: ignore[arg-type]
        if isinstance(leaf, Tensor | int | float | str | bool) or leaf is None:
            continue
        try:
            return tuple(get_process_group_ranks(ProcessGroup.unbox(getattr(leaf, "real_obj", leaf))))
        except (RuntimeError, TypeError):  # another object, such as a reduction
            continue
    raise AssertionError("a collective has a process group")
