"""The layers of Megatron's GPTModel that are not Megatron's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad, rms_norm


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """How a micro-batch attends. It passes through Megatron's layers in place of its ``packed_seq_params``.

    Recomputed layers therefore see their own micro-batch's, not that of the last forward pass.

    time: length of the rows on this context-parallel rank, without what sequence parallelism pads. attention: a function of
    ``transformers``'s AttentionInterface. mask, options: what is passed to it. documents: for Mamba layers, the number of the
    document at each position of the whole row, with what sequence parallelism pads, or None without packing.
    """

    time: int
    attention: Callable[..., Any]
    mask: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    documents: Tensor | None = None
    qkv_format: str = "sbhd"


class CoreAttention(nn.Module):
    """Attention by the function that a Hugging Face model would use, for any packing and context parallelism."""

    is_causal = True

    def __init__(
        self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **unused: Any
    ) -> None:
        super().__init__()
        ranks, context = (group.size() for group in (pg_collection.tp, pg_collection.cp))
        heads, keys = config.num_attention_heads // ranks, config.num_query_groups // ranks
        # With fewer key heads than context-parallel ranks, each gets a copy of one.
        self.num_key_value_groups = heads // (keys if keys % context == 0 else context)
        self.scaling = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *unused: Any,
        packed_seq_params: AttentionInputs,
        **also_unused: Any,
    ) -> Tensor:
        """query, key, value: [time, batch, heads, dim]; returns [time, batch, heads · dim]."""
        inputs, padding = packed_seq_params, len(query) - packed_seq_params.time
        q, k, v = (x[: inputs.time].permute(1, 2, 0, 3) for x in (query, key, value))
        given = {"dropout": 0.0, "scaling": self.scaling, **inputs.options}
        attended = inputs.attention(self, q, k, v, inputs.mask, **given)[0]  # [batch, time, heads, dim]
        return pad(attended.transpose(0, 1).flatten(2), (0, 0, 0, 0, 0, padding))


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm with the mark by which Megatron sums its gradients over tensor-parallel ranks.

    Megatron's own wrapper of it refuses sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class Norm(nn.Module):
    """RMSNorm or LayerNorm, by Megatron's ``config``, whose weight may be stored as the difference from 1."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        like = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.eps, self._offset = eps, float(config.layernorm_zero_centered_gamma)
        self.weight = nn.Parameter(torch.full((hidden_size,), 1 - self._offset, **like))
        self.bias = nn.Parameter(torch.zeros(hidden_size, **like)) if config.normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # see RMSNorm

    def forward(self, x: Tensor) -> Tensor:
        """Computed in float32."""
        weight = self.weight.float() + self._offset
        if self.bias is None:
            return rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        return layer_norm(x.float(), weight.shape, weight, self.bias.float(), self.eps).to(x.dtype)
