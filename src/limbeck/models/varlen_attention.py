"""Varlen attention: documents packed end to end in one row attend only to themselves.

A dense mask for a packed row needs time and memory quadratic in the length of the row. There are two ways around it:

- ``torch.nn.attention.varlen``, flash attention in PyTorch, computes all documents in one call from their boundaries. It needs
  an NVIDIA GPU, bf16 or fp16, and a causal or sliding window mask; ``_obstacle`` lists what it cannot do.
- In every other case the model's own attention function is called once per document. The mask within a document (causal,
  sliding window, chunks) and the scores (soft-caps, sinks) stay those of the model: its mask function makes the mask of the
  longest document, and shorter documents use a corner of that mask.

The package flash-attn and flex attention receive the document boundaries directly.

The implementations are registered in ``transformers``; see its documentation of ``AttentionInterface``.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flex_attention_mask, sdpa_mask

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

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

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_NO_GPU = "the varlen kernel needs a GPU"
_VARLEN_OPTIONS = frozenset(() if varlen_attn is None else inspect.signature(varlen_attn).parameters)

_warned: set[str] = set()
_documents: ContextVar[Documents | None] = ContextVar("documents", default=None)
_one_per_row: ContextVar[bool] = ContextVar("one_per_row", default=False)


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a packed row: their lengths, and [documents + 1] int32, their boundaries on the device."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor


@dataclass(frozen=True, eq=False)
class _DocumentMask:
    """Passed to the layers in place of a mask.

    A compiled layer guards the fields that it reads. So the path through the varlen kernel must not read ``lengths`` or
    ``make_dense``, which differ in every batch and would compile the layer anew.

    lengths: of the documents. cu_seqlens: their boundaries, see ``Documents``. max_length: at least the longest length.
    window: of sliding window attention, or None. obstacle: why the varlen kernel cannot be used with this mask, or None.
    make_dense: makes the mask of the longest document; None for a causal mask that the attention function applies itself.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_length: int
    window: int | None
    obstacle: str | None
    make_dense: Callable[[], Tensor | None]

    @cached_property
    def dense(self) -> Tensor | None:
        """The mask of the longest document, made when the first layer needs it."""
        return self.make_dense()


def varlen_kwargs(
    implementation: str, input_ids: Tensor, documents: Sequence[int] | None, cu_seqlens: Tensor | None
) -> dict[str, Any]:
    """Returns the keyword arguments that make a model's body attend within ``documents`` only, beside ids and positions.

    input_ids:  [1, total] or, with context parallelism, this rank's shard of it.
    documents:  the document lengths, in order; they sum to ``total``. None without packing.
    cu_seqlens: [documents + 1] int32 on the device, their boundaries. None without packing.

    The result is empty for an implementation that uses the position ids alone.
    """
    implementation, divided, _ = implementation.partition(CONTEXT_PARALLEL_MARK)
    if documents is None:
        return {"attention_mask": torch.ones_like(input_ids)} if divided else {}
    if implementation in BY_DOCUMENT.values():
        # With a mask given, transformers does not look for documents itself.
        return {"attention_mask": torch.ones_like(input_ids)}
    if implementation.startswith("flash_attention"):
        longest = max(documents)
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return {}


@contextmanager
def separate_documents(documents: Sequence[int], cu_seqlens: Tensor) -> Iterator[None]:
    """Masks made inside the block separate ``documents``; see ``varlen_kwargs``.

    Layers that activation checkpointing recomputes later need no context, because they keep their mask.
    """
    token = _documents.set(Documents(tuple(documents), cu_seqlens))
    try:
        yield
    finally:
        _documents.reset(token)


@contextmanager
def one_document_per_row() -> Iterator[None]:
    """Each row is one document in the block. transformers would read that from the values of the positions, for which the host
    waits until the GPU has computed everything before them.
    """
    token = _one_per_row.set(True)
    try:
        yield
    finally:
        _one_per_row.reset(token)


def _unless_known(find: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    @wraps(find)
    def found(position_ids: Tensor) -> Tensor | None:
        return None if _one_per_row.get() else find(position_ids)

    return found


masking_utils.find_packed_sequence_indices = _unless_known(masking_utils.find_packed_sequence_indices)


def current_documents() -> Documents | None:
    """The documents of ``separate_documents`` inside its block, else None."""
    return _documents.get()


def _mask_by_document(plain: Callable[..., Any]) -> Callable[..., Any]:
    def mask(**arguments: Any) -> Any:
        documents = _documents.get()
        if documents is None:
            return plain(**arguments)
        longest = max(documents.lengths)
        # Older versions of transformers pass the positions of the queries, newer ones only their number.
        positions = arguments.get("cache_position")
        queries = {"q_length": longest} if positions is None else {"cache_position": positions[:longest]}
        changed = {"batch_size": 1, **queries, "kv_length": longest, "attention_mask": None}
        obstacle = None
        if not arguments.get("allow_is_causal_skip", True):  # other masks are joined with it
            obstacle = "its mask is not only causal"
        window = arguments.get("local_size")
        return _document_mask(documents, window, obstacle, lambda: plain(**{**arguments, **changed}))

    return mask


def _document_mask(
    documents: Documents, window: int | None, obstacle: str | None, make_dense: Callable[[], Tensor | None]
) -> _DocumentMask:
    longest = max(documents.lengths)
    return _DocumentMask(
        documents.lengths,
        documents.cu_seqlens,
        # Rounded, because a compiled layer is compiled anew for another length. Too many blocks of queries cost little.
        max(128, 1 << (longest - 1).bit_length()),
        window,
        _device_obstacle(documents.cu_seqlens.device) or obstacle,
        make_dense,
    )


def causal_mask() -> Any:
    """The mask to pass to a registered attention function for causal attention: within the documents of
    ``separate_documents`` if they are separated, else None, for which the function applies it itself.
    """
    documents = _documents.get()
    return None if documents is None else _document_mask(documents, None, None, lambda: None)


def _attention_by_document(own: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        """query, key, value: [batch, heads, time, dim]; returns [batch, time, heads, dim]."""
        if not isinstance(attention_mask, _DocumentMask):
            return plain(module, query, key, value, attention_mask, **arguments)
        obstacle = attention_mask.obstacle or _obstacle(own, module, query, value, attention_mask.window, arguments)
        if obstacle is not None:
            return _each_document(plain, obstacle, module, query, key, value, attention_mask, arguments), None
        dtype = _kernel_dtype(value)
        query, key, value = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
        mask, scale = attention_mask, arguments.get("scaling")
        return _varlen(query, key, value, mask.cu_seqlens, mask.max_length, mask.window, scale).unsqueeze(0), None

    return attention


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Causal attention within each document, [total, heads, dim]. A position sees ``window`` positions, its own included.

    query: [total, heads, dim]. key, value: [total, groups, dim], where the number of heads is a multiple of the groups.
    """
    assert varlen_attn is not None
    if "window_size" in _VARLEN_OPTIONS:
        options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
        if "enable_gqa" in _VARLEN_OPTIONS:  # PyTorch 2.12; before it the kernel takes groups without this option
            options["enable_gqa"] = True
    else:  # PyTorch 2.10
        options = {"is_causal": True}
        query = query if scale is None else query * (scale * query.shape[-1] ** 0.5)
    output: Tensor = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_length, max_length, **options)
    return output


@cache
def _device_obstacle(device: torch.device) -> str | None:
    """Why the varlen kernel cannot be used on ``device``, or None if it can."""
    if device.type != "cuda":
        return _NO_GPU
    if varlen_attn is None:
        return "PyTorch is too old; install PyTorch 2.10 or later"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the varlen kernel needs an NVIDIA GPU of the Ampere generation or later"
    return None


def _obstacle(
    own: str, module: Any, query: Tensor, value: Tensor, window: int | None, arguments: dict[str, Any]
) -> str | None:
    """Why the varlen kernel cannot compute the attention of a layer, or None if it can.

    own: the attention implementation. window: of the mask. arguments: keyword arguments of the attention function.
    """
    if arguments.get("softcap") is not None:
        return "its scores have a soft-cap; set attn_implementation: flex_attention"
    if arguments.get("s_aux") is not None:
        return "it has attention sinks; set attn_implementation: flex_attention"
    if own != "sdpa":
        return f"attn_implementation is {own}; set attn_implementation: sdpa if the model supports it"
    if arguments.get("position_bias") is not None:
        return "its scores have a bias"
    if arguments.get("dropout"):
        return "it has attention dropout; set model_config_kwargs.attention_dropout: 0"
    is_causal = arguments.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return "it is not causal"
    # Layers pass their sliding window for flash attention. Chunks are in the mask only.
    if window != arguments.get("sliding_window"):
        return "its mask is neither causal nor a sliding window"
    if window is not None and "window_size" not in _VARLEN_OPTIONS:
        return "it has a sliding window; install PyTorch 2.11 or later"
    if _kernel_dtype(value) not in _KERNEL_DTYPES:
        return "it is computed in float32; set model_args.dtype: bf16"
    if query.shape[-1] != value.shape[-1] or query.shape[-1] % 8 or query.shape[-1] > 256:
        return "the varlen kernel needs equal head dimensions that are a multiple of 8 and at most 256"
    return None


def _kernel_dtype(value: Tensor) -> torch.dtype:
    """The dtype of attention. Norms in float32 under autocast leave queries and keys, and sometimes values, in it."""
    if value.dtype == torch.float32 and torch.is_autocast_enabled(value.device.type):
        return torch.get_autocast_dtype(value.device.type)
    return value.dtype


@torch.compiler.disable  # it would be compiled anew for the lengths of every batch
def _each_document(
    plain: Callable[..., Any],
    obstacle: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: _DocumentMask,
    arguments: dict[str, Any],
) -> Tensor:
    """Calls ``plain`` for each document; [batch, time, heads, dim]. Warns once, unless on a CPU, where nothing is faster."""
    if obstacle not in (_NO_GPU, *_warned):
        _warned.add(obstacle)
        warnings.warn(
            f"the attention of {type(module).__name__} is computed one packed document at a time, which is slow on a GPU: "
            f"{obstacle}.",
            stacklevel=3,
        )
    lengths = list(mask.lengths)
    # split instead of slices: the gradient of each slice would have the length of the row.
    parts = zip(lengths, query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    dense = mask.dense
    outputs = [
        plain(module, q, k, v, None if dense is None else dense[..., :n, :n], **arguments)[0] for n, q, k, v in parts
    ]
    return torch.cat(outputs, 1)


def _flex_mask_by_document(**arguments: Any) -> Any:
    documents = _documents.get()
    if documents is None:
        return flex_attention_mask(**arguments)
    starts, total = documents.cu_seqlens, sum(documents.lengths)
    numbers = torch.arange(len(documents.lengths), device=starts.device)
    document = torch.repeat_interleave(numbers, starts.diff(), output_size=total)  # with the size given, nothing waits
    position = torch.arange(total, device=starts.device) - starts[document]
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
    AttentionInterface.register(BY_DOCUMENT[_own], _attention_by_document(_own, _attention))
    AttentionMaskInterface.register(BY_DOCUMENT[_own], _mask_by_document(_mask))
AttentionInterface.register(BY_DOCUMENT["flex_attention"], _flex)
AttentionMaskInterface.register(BY_DOCUMENT["flex_attention"], _flex_mask_by_document)
