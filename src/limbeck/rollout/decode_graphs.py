"""CUDA graphs of decoding passes.

A GPU computes the next tokens of a small model faster than Python launches the kernels. A graph launches all of them at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.rollout.kv_cache import Decode, SlotCache, round_length

_BLOCK = 256
"""A graph reads a multiple of so many positions of the cache. A larger one needs fewer graphs and masks more positions."""

Forward = Callable[[Tensor, Tensor, Decode], Tensor]


@dataclass(frozen=True)
class _Recorded:
    """A recorded pass with its inputs, ids [rows, 1] and positions [rows], and its output, logits [rows, vocabulary]."""

    ids: Tensor
    positions: Tensor
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """Computes the decoding passes of one call of ``generate``.

    Each shape of a pass is computed once without a graph, which lets libraries set themselves up and shows whether the pass
    can be recorded, then recorded and replayed. To have few shapes, rows are rounded up to a power of two; the rows that this
    adds use free slots and are not read.

    Args:
        forward: ids [rows, 1], positions [rows] and a ``Decode`` → logits [rows, vocabulary].
        records: whether to record passes. It becomes False, with a warning, if they cannot be recorded.
    """

    def __init__(self, forward: Forward, slots: SlotCache, *, records: bool) -> None:
        self._forward, self._slots, self.records = forward, slots, records
        self._recorded: dict[tuple[int, int], _Recorded | None] = {}

    def logits(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """ids: [rows, 1]. positions: [rows], the largest of which is ``longest``. Returns [rows, vocabulary], valid until the
        next call.
        """
        rows = len(ids)
        slots = Decode(self._slots, positions, round_length(longest + 1))
        if not self.records:
            return self._forward(ids, positions, slots)
        size = min(self._slots.slots, 1 << (rows - 1).bit_length())
        length = min(self._slots.length, -(-(longest + 1) // _BLOCK) * _BLOCK)
        shape = size, length
        if shape not in self._recorded:
            self._recorded[shape] = None
            with _Reads() as reads:
                logits = self._forward(ids, positions, slots)
            if reads.found:
                self._give_up(f"each pass waits for a value of the GPU ({reads.found})")
            return logits
        recorded = self._recorded[shape] or self._record(ids, size, length)
        if recorded is None:
            return self._forward(ids, positions, slots)
        self._recorded[shape] = recorded
        recorded.ids[:rows].copy_(ids)
        recorded.positions[:rows].copy_(positions)
        recorded.replay()
        return recorded.logits[:rows]

    def _record(self, like: Tensor, size: int, length: int) -> _Recorded | None:
        ids, positions = like.new_zeros(size, 1), like.new_zeros(size)
        try:
            replay, logits = record(lambda: self._forward(ids, positions, Decode(self._slots, positions, length)))
        except RuntimeError as error:
            self._give_up(str(error).strip().split("\n")[0])
            return None
        return _Recorded(ids, positions, replay, logits)

    def _give_up(self, reason: str) -> None:
        self.records = False
        warnings.warn(
            f"The generator hf writes without CUDA graphs, which is slower, because it cannot record this model: {reason}.",
            stacklevel=2,
        )


class _Reads(TorchDispatchMode):
    """Finds an operator that no graph can hold: one for which the host waits, because it reads a value or its result's size,
    or copies from one device to another.
    """

    _OPERATORS = (
        "item",
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "unique_dim",
        "_unique2",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        result = func(*args, **(kwargs or {}))
        copied = {"_to_copy": args[:1], "copy_": args[1:2]}.get(name, ())
        if (
            name in self._OPERATORS
            or any(index is not None and index.dtype is torch.bool for index in indices)
            or any(source.device != result.device for source in copied)
        ):
            self.found = name
        return result


@cache
def _stream() -> torch.cuda.Stream:
    """Of all recordings, because libraries keep a workspace for each stream."""
    return torch.cuda.Stream()


def record(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A function that repeats ``compute`` on the GPU, and the tensor that receives the result. Nothing is computed yet.

    Raises RuntimeError if ``compute`` cannot be recorded.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(
        stream
    ):  # torch.cuda.graph would also collect garbage and empty the allocator's cache each time
        graph.capture_begin(capture_error_mode="thread_local")  # a student may train in another thread
        try:
            result = compute()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, result
