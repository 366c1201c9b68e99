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
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

GATHERED = "gathered"
"""The tag of what FSDP2 makes: gathered parameters, buffers of its collectives, reduced gradients."""

_aten = torch.ops.aten
_KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}


class Tracker(TorchDispatchMode):
    """Inside ``with tracker:`` every storage is counted from the operator that makes it to the moment that it is freed.

    live: bytes by tag; peak: the same when their sum was largest. flops: of matrix products and attention, as
    ``torch.utils.flop_counter`` counts them. sent: for each collective and the ranks of its group, the bytes of its larger
    tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0
        self.sent: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._tag = "other"
        self._known: dict[int, tuple[Any, str, int]] = {}  # by the storage's id: a weak reference, its tag, its bytes
        self._total = self._highest = 0
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
        """Count ``tensors`` that were made before, or call what they hold by another tag."""
        for tensor in tensors:
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            self._forget(id(storage))
            self._count(storage, tag)

    def reset_peak(self) -> None:
        """Look for the largest sum from now on."""
        self._highest, self.peak = self._total, self.live.copy()

    def __enter__(self) -> Tracker:
        # Resizing a storage, which is how FSDP2 frees and takes its gathered parameters, is no operator.
        self._resize = resize = torch.UntypedStorage.resize_

        def watched(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            tag = self._forget(id(storage))
            self._count(storage, tag or self._maker())
            return result

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign]
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
        if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(each.shape for each in args[:3]))
        elif packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += sdpa_backward_flop_count(*(each.shape for each in args[:4]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif func.namespace == "c10d" and packet.__name__ in _KINDS:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            group = next(leaf for leaf in tree_leaves(args) if not isinstance(leaf, Tensor) and _is_group(leaf))
            ranks = tuple(get_process_group_ranks(ProcessGroup.unbox(getattr(group, "real_obj", group))))
            self.sent[_KINDS[packet.__name__], ranks] += max(each.numel() * each.element_size() for each in tensors)
        return result

    def _maker(self) -> str:
        frame = sys._getframe(1)
        while frame is not None:
            if "_fully_shard" in frame.f_code.co_filename:
                return GATHERED
            frame = frame.f_back  # type: ignore[assignment]
        return self._tag

    def _count(self, storage: Any, tag: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._forget(key)), tag, size)
        self.live[tag] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self.peak = self._total, self.live.copy()

    def _forget(self, key: int) -> str | None:
        if key not in self._known:
            return None
        _, tag, size = self._known.pop(key)
        self.live[tag] -= size
        self._total -= size
        return tag


def _is_group(leaf: Any) -> bool:
    try:
        ProcessGroup.unbox(getattr(leaf, "real_obj", leaf))
    except (RuntimeError, TypeError):
        return False
    return True
