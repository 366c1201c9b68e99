"""A cache of keys and values in which every row has its own length, and the attention that reads it.

Models of transformers call it as an attention implementation (``SLOT_ATTENTION``), with a ``Prefill`` or a ``Decode`` in
the keyword argument ``slots``. So the cache works for every model whose layers share that interface, and no mask is made
but the one used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from limbeck.errors import LimbeckError
from limbeck.rollout.recurrent_cache import RecurrentPass, RecurrentStates

SLOT_ATTENTION = "limbeck_slots"
"""The name of the attention implementation."""

_BLOCK = 64
"""Lengths are multiples of it: kernels on GPUs want aligned masks, and memory is reused more often."""


def round_length(length: int) -> int:
    """``length``, rounded up to a length that the cache uses."""
    return -(-length // _BLOCK) * _BLOCK


class SlotCache:
    """Keys and values of every layer, each [slots, groups, length, dim]; allocated when a layer first writes."""

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, round_length(length)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.recurrent = RecurrentStates(slots)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        tensors = [tensor for layer in self._layers.values() for tensor in layer]
        return sum(tensor.nbytes for tensor in tensors + self.recurrent.tensors())

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that computes ``key`` and ``value``."""
        if number not in self._layers:
            # Zeros, because attention multiplies what is masked by 0, and uninitialised memory may hold NaN.
            self._layers[number] = self._zeros(key), self._zeros(value)
        return self._layers[number]

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copies the first ``length`` positions of the slots ``sources`` to the slots ``targets``."""
        for keys, values in self._layers.values():
            source, target = (torch.tensor(slots, device=keys.device) for slots in (sources, targets))
            for tensor in (keys, values):
                tensor[target, :, :length] = tensor[source, :, :length]
        for tensor in self.recurrent.tensors():
            tensor[list(targets)] = tensor[list(sources)]

    def clear(self, slot: int) -> None:
        """Begin ``slot`` without a prompt. Keys and values are overwritten before they are read."""
        for tensor in self.recurrent.tensors():
            tensor[slot] = 0

    def _zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros((self.slots, like.shape[1], self.length, like.shape[3]))


class SlotPass(Protocol):
    """A forward pass of the model that writes keys and values to slots."""

    recurrent: RecurrentPass

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """query: [batch, heads, time, dim]. key, value: [batch, groups, time, dim]. Returns [batch, time, heads, dim].

        window: of sliding window attention, the number of positions that a token attends to; else None.
        """


class Prefill:
    """Writes right-padded prompts to the first positions of the slots ``rows``.

    Tokens attend to earlier ones only, so the padding changes none; decoding overwrites it before it is read. With recurrent
    layers, whose states the padding would change, prompts must be equally long.
    """

    def __init__(self, cache: SlotCache, rows: Sequence[int]) -> None:
        self._cache, self._rows = cache, rows
        self.recurrent = RecurrentPass(cache.recurrent, rows, begins=True)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        keys, values = self._cache.layer(layer, key, value)
        time = key.shape[2]
        keys[self._rows, :, :time] = key
        values[self._rows, :, :time] = value
        if window is None or window >= time:
            output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        else:
            place = torch.arange(time, device=query.device)
            back = place[:, None] - place
            mask = (back >= 0) & (back < window)
            # Fused kernels on GPUs take a mask or groups, not both.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return output.transpose(1, 2)


class Decode:
    """Writes one token to each of the first slots, at its own position; it attends to the positions before it.

    positions: of the tokens, [batch] on the device. length: positions of the cache that are read, more than each of them.
    """

    def __init__(self, cache: SlotCache, positions: Tensor, length: int) -> None:
        self._cache, self._positions, self._length = cache, positions, length
        self._rows = torch.arange(len(positions), device=positions.device)
        self._masks: dict[int | None, Tensor] = {}
        self.recurrent = RecurrentPass(cache.recurrent, slice(len(positions)), begins=False)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        batch, heads, _, dim = query.shape
        keys, values = self._cache.layer(layer, key, value)
        keys[self._rows, :, self._positions] = key.squeeze(2)
        values[self._rows, :, self._positions] = value.squeeze(2)
        keys, values = keys[:batch, :, : self._length], values[:batch, :, : self._length]
        if window not in self._masks:
            self._masks[window] = self._mask(window, query.dtype)
        # The heads of a group become queries of one head, so that keys and values need not be repeated.
        query = query.reshape(batch, keys.shape[1], -1, dim)
        output = scaled_dot_product_attention(query, keys, values, attn_mask=self._masks[window], scale=scale)
        return output.reshape(batch, 1, heads, -1)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[batch, 1, 1, length], added to the scores."""
        back = self._positions[:, None] - torch.arange(self._length, device=self._positions.device)
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        return torch.zeros_like(back, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None, None]


def _slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    slots: SlotPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if softcap is not None or s_aux is not None:
        raise LimbeckError(
            f"{type(module).__name__} has a soft-cap or sinks in its attention, which the generator hf does not compute; "
            "use another generator."
        )
    return slots.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register(SLOT_ATTENTION, _slot_attention)
