"""Varlen attention: documents packed end to end in one row attend only to themselves.

A dense mask for a packed row needs time and memory quadratic in the length of the row. Here the model's own attention
function is called once per document, so the cost is the sum over the documents. The mask within a document (causal, sliding
window, chunks) and the scores (soft-caps, sinks) stay those of the model: its mask function makes the mask of the longest
document, and shorter documents use a corner of that mask. Flash attention receives the document boundaries directly.

The implementations are registered in ``transformers``; see its documentation of ``AttentionInterface``.
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
"""Attention implementation of transformers -> its varlen variant. Without documents both compute the same."""

CONTEXT_PARALLEL_MARK = "_divided_"
"""Follows an implementation's name where each rank holds a shard of every row; see strategies/context_parallel.py."""

GPU_KERNELS = ("flash_attention", "flex_attention")
"""Prefixes of the implementations that do not run, or run slowly, on a CPU."""

_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("document lengths", default=None)


@dataclass(frozen=True)
class _DocumentMask:
    """Passed to the layers in place of a mask: the document lengths, and the mask of the longest document or None."""

    lengths: tuple[int, ...]
    mask: Tensor | None


def varlen_kwargs(implementation: str, input_ids: Tensor, documents: Sequence[int] | None) -> dict[str, Any]:
    """Returns the keyword arguments that make a model's body attend within ``documents`` only, beside ids and positions.

    input_ids: [1, total] or, with context parallelism, this rank's shard of it.
    documents: the document lengths, in order; they sum to ``total``. None without packing.

    The result is empty for an implementation that uses the position ids alone.
    """
    implementation, divided, _ = implementation.partition(CONTEXT_PARALLEL_MARK)
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
def separate_documents(documents: Sequence[int]) -> Iterator[None]:
    """Masks made inside the block separate ``documents``.

    Layers that activation checkpointing recomputes later need no context, because they keep their mask.
    """
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
        # Older versions of transformers pass the positions of the queries, newer ones only their number.
        positions = arguments.get("cache_position")
        queries = {"q_length": longest} if positions is None else {"cache_position": positions[:longest]}
        changed = {"batch_size": 1, **queries, "kv_length": longest, "attention_mask": None}
        return _DocumentMask(lengths, plain(**{**arguments, **changed}))

    return mask


def _attention_by_document(plain: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        """query, key, value: [batch, heads, time, dim]; returns [batch, time, heads, dim]."""
        if not isinstance(attention_mask, _DocumentMask):
            return plain(module, query, key, value, attention_mask, **arguments)
        return _attend_each(plain, module, query, key, value, attention_mask, **arguments)

    return attention


@torch.compiler.disable  # compiled code would be specialized on the lengths of one row
def _attend_each(
    plain: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: _DocumentMask,
    **arguments: Any,
) -> tuple[Tensor, None]:
    lengths, whole = list(documents.lengths), documents.mask
    # split instead of slices: the gradient of each slice would have the length of the row.
    parts = zip(lengths, query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [
        plain(module, q, k, v, None if whole is None else whole[..., :n, :n], **arguments)[0] for n, q, k, v in parts
    ]
    return torch.cat(outputs, 1), None


def _flex_mask_by_document(**arguments: Any) -> Any:
    lengths = _lengths.get()
    if lengths is None:
        return flex_attention_mask(**arguments)
    given = arguments.get("cache_position")
    device = arguments["device"] if given is None else given.device
    each = torch.tensor(lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), each)
    position = torch.arange(len(document), device=device) - (each.cumsum(0) - each)[document]
    within = arguments["mask_function"]

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & within(batch, head, position[query], position[key])

    return flex_attention_mask(**{**arguments, "mask_function": mask, "attention_mask": None})


def _flex(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, Any]:
    """Casts queries and keys, because a norm under autocast may return another dtype and this kernel needs one."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **arguments)


def eager_attention(module: Any, *arguments: Any, **named: Any) -> Any:
    """Calls the eager attention of the model's own file; transformers has no common one."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **named)


for _own, _attention, _mask in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", eager_attention, eager_mask)):
    AttentionInterface.register(BY_DOCUMENT[_own], _attention_by_document(_attention))
    AttentionMaskInterface.register(BY_DOCUMENT[_own], _mask_by_document(_mask))
AttentionInterface.register(BY_DOCUMENT["flex_attention"], _flex)
AttentionMaskInterface.register(BY_DOCUMENT["flex_attention"], _flex_mask_by_document)
