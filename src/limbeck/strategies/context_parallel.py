"""Ulysses context parallelism: every rank holds a part of each row's time, and during attention some heads of the whole
row.

Before attention one all-to-all turns [all heads, part of the time] into [some heads, all of the time]; afterwards
another turns it back. Which tokens see which is decided by the model's own attention function, so sliding windows and
packed documents work. Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv:2309.14509).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limbeck.errors import LimbeckError
from limbeck.models.varlen_attention import CONTEXT_PARALLEL_MARK, eager_attention


def apply_context_parallel(model: Any, trunk: Any, group: dist.ProcessGroup, name: str) -> None:
    """Make the attention of ``model`` exchange heads for time over ``group``; its inputs are then parts of whole
    rows.
    """
    own, ranks = model.config._attn_implementation, dist.get_world_size(group)
    attention = eager_attention if own == "eager" else ALL_ATTENTION_FUNCTIONS.get(own)
    mask = ALL_MASK_ATTENTION_FUNCTIONS.get(own)
    if attention is None or mask is None:
        raise LimbeckError(
            f"{name}: context_parallel_size = {ranks} needs another attn_implementation than {own}; use sdpa."
        )
    exchanged = f"{own}{CONTEXT_PARALLEL_MARK}{ranks}_{group.group_name}"
    AttentionInterface.register(exchanged, exchange_heads(attention, group))
    AttentionMaskInterface.register(exchanged, _whole_row_mask(mask, ranks))
    model.set_attn_implementation(exchanged)
    for module in trunk.modules():
        groups = getattr(module, "num_key_value_groups", None)
        if groups is not None:
            heads, keys = _local_heads(module, trunk)
            if keys % ranks:
                module.num_key_value_groups = heads // ranks


def _local_heads(attention: Any, trunk: Any) -> tuple[int, int]:
    """Query and key heads of one tensor-parallel rank."""
    config = trunk.config.get_text_config()
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    weight = getattr(getattr(attention, "q_proj", None), "weight", None)
    ranks = weight.device_mesh.size() if isinstance(weight, DTensor) else 1
    return heads // ranks, max(1, keys // ranks)


def _whole_row_mask(plain: Any, ranks: int) -> Any:
    def mask(**arguments: Any) -> Any:
        lengths: dict[str, Any] = {key: arguments[key] * ranks for key in ("q_length", "kv_length") if key in arguments}
        return plain(**{**arguments, **lengths, "attention_mask": None})

    return mask


def exchange_heads(plain: Any, group: dist.ProcessGroup) -> Any:
    """The attention function ``plain`` for ranks of ``group`` that each hold a part of every row's time."""
    ranks = dist.get_world_size(group)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        """query, key, value: [batch, heads, time / ranks, dim]; returns [batch, time / ranks, heads, dim]."""
        if key.shape[1] % ranks:
            key, value = (x.repeat_interleave(ranks // x.shape[1], 1) for x in (key, value))
        query, key, value = (_Exchange.apply(x, group, 1, 2) for x in (query, key, value))
        output = plain(module, query, key, value, attention_mask, **arguments)[0]
        return _Exchange.apply(output, group, 1, 2), None

    return attention


class _Exchange(torch.autograd.Function):
    """All-to-all: split along one dimension and concatenate along another; rank order is time order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        return _exchange(x, group, split, join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.group, ctx.join, ctx.split), None, None, None


def _exchange(x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
    parts = torch.stack(x.chunk(dist.get_world_size(group), split))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(), join)


def gather_context(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[batch, time / ranks, …] of every rank → [batch, time, …], without a gradient."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, 1)
