"""Attention over documents that lie end to end in one row, each of which sees itself alone.

A dense mask for such a row costs time and memory with the square of the whole row. Here the model's own attention function
is called once for each document instead, so that a row costs the sum of its documents. Which tokens see which within a
document (causal, a sliding window, chunks) and how scores are formed (soft-caps, sinks) stays the model's own: its mask
function is asked for the longest document, and the others use a corner of that mask. Kernels that take boundaries
themselves (flash attention) are told them. Nothing here knows batches or losses.

The switch is ``transformers``' registry of attention functions; see its documentation of AttentionInterface.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flex_attention_mask, sdpa_mask

BY_DOCUMENT = {
    "sdpa": "sdpa_by_document",
    "eager": "eager_by_document",
    "flex_attention": "flex_attention_by_document",
}
"""The attention implementations of transformers that have a counterpart here. Without documents it does the same."""

DIVIDED = "_divided_"
"""What follows an implementation's name where each rank of a group holds a stretch of every row; see strategies.context."""

FOR_GPUS = ("flash_attention", "flex_attention")
"""How the names of those begin that do not run, or not well, on a CPU."""

_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("document lengths", default=None)


@dataclass(frozen=True)
class _Apart:
    """What a model carries to its layers in place of a mask: document lengths, and the mask of the longest or None."""

    lengths: tuple[int, ...]
    mask: Tensor | None


def document_arguments(implementation: str, input_ids: Tensor, documents: Sequence[int] | None) -> dict[str, Any]:
    """What to call a model's body with, beside ids and positions, so that ``documents`` in ``input_ids`` [1, total] stay apart.

    documents: the lengths, in order; they sum to ``total``, also where ``input_ids`` is a stretch of it. Nothing, if
    ``implementation`` reads positions alone.
    """
    implementation, divided, _ = implementation.partition(DIVIDED)
    if documents is None:
        return {"attention_mask": torch.ones_like(input_ids)} if divided else {}
    if implementation in BY_DOCUMENT.values():
        # With a mask given, transformers does not look for documents itself.
        return {"attention_mask": torch.ones_like(input_ids)}
    if implementation.startswith("flash_attention"):
        ends = torch.tensor([0, *accumulate(documents)], dtype=torch.int32).to(input_ids.device, non_blocking=True)
        longest = max(documents)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return {}


@contextmanager
def kept_apart(documents: Sequence[int]) -> Iterator[None]:
    """Masks made inside keep ``documents`` apart. Layers computed again later need no context: they have their mask."""
    token = _lengths.set(tuple(documents))
    try:
        yield
    finally:
        _lengths.reset(token)


def _mask_by_document(plain: Callable[..., Any]) -> Callable[..., Any]:
    def mask(**arguments: Any) -> Any:
        lengths = _lengths.get()
        if lengths is None:
            return plain(**arguments)
        longest = max(lengths)
        # transformers told the queries' places before it told their number alone.
        places = arguments.get("cache_position")
        queries = {"q_length": longest} if places is None else {"cache_position": places[:longest]}
        changed = {"batch_size": 1, **queries, "kv_length": longest, "attention_mask": None}
        return _Apart(lengths, plain(**{**arguments, **changed}))

    return mask


def _attention_by_document(plain: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        """query, key, value: [batch, heads, time, dim]; returns [batch, time, heads, dim]."""
        if not isinstance(attention_mask, _Apart):
            return plain(module, query, key, value, attention_mask, **arguments)
        lengths, whole = list(attention_mask.lengths), attention_mask.mask
        # Split, not sliced: the gradient of a slice is as long as the row, that of a split is put together once.
        parts = zip(lengths, query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        outputs = [
            plain(module, q, k, v, None if whole is None else whole[..., :n, :n], **arguments)[0]
            for n, q, k, v in parts
        ]
        return torch.cat(outputs, 1), None

    return attention


def _flex_mask_by_document(**arguments: Any) -> Any:
    lengths = _lengths.get()
    if lengths is None:
        return flex_attention_mask(**arguments)
    given = arguments.get("cache_position")
    device = arguments["device"] if given is None else given.device
    each = torch.tensor(lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), each)
    place = torch.arange(len(document), device=device) - (each.cumsum(0) - each)[document]
    within = arguments["mask_function"]

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & within(batch, head, place[query], place[key])

    return flex_attention_mask(**{**arguments, "mask_function": mask, "attention_mask": None})


def _flex(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, Any]:
    """Under autocast a norm may have left queries and keys in another precision, which this kernel does not take."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **arguments)


def eager_attention(module: Any, *arguments: Any, **named: Any) -> Any:
    """Eager attention is not one function: each model's file has its own."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **named)


for _own, _attention, _mask in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", eager_attention, eager_mask)):
    AttentionInterface.register(BY_DOCUMENT[_own], _attention_by_document(_attention))
    AttentionMaskInterface.register(BY_DOCUMENT[_own], _mask_by_document(_mask))
AttentionInterface.register(BY_DOCUMENT["flex_attention"], _flex)
AttentionMaskInterface.register(BY_DOCUMENT["flex_attention"], _flex_mask_by_document)
