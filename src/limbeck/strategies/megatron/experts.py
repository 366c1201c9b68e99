"""The experts of a mixture of experts, between Megatron's router and token dispatcher.

A rank holds its experts in two tensors with the layout of Transformers, so that the weights, moments and gradients of all
of them are one tensor each. Megatron's own modules for that need Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu

from limbeck.strategies.megatron.core import import_megatron


class Experts(nn.Module):
    """Gated feed-forward layers, each for the tokens that are routed to it.

    Args:
        count: experts on this rank.
        config: Megatron's.
        pg_collection: Megatron's groups. Each rank of ``expt_tp`` has a slice of the feed-forward columns.
    """

    def __init__(self, count: int, config: Any, *, pg_collection: Any, **unused: Any) -> None:
        super().__init__()
        self._grouped = config.moe_grouped_gemm
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        like = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, config.hidden_size, **like))
        self.down_proj = nn.Parameter(torch.empty(count, config.hidden_size, width, **like))
        # Without groups of their own, Megatron treats experts as it does other sliced matrices.
        divided = pg_collection.ep.size() > 1 or pg_collection.expt_tp.size() != pg_collection.tp.size()
        for dimension, parameter in ((1, self.gate_up_proj), (2, self.down_proj)):
            # No other rank over which the gradients' norm is summed has the same values.
            import_megatron().tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, dimension, 1)
            parameter.allreduce = not divided  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """tokens: [tokens, hidden], expert by expert. counts: [experts] of them. weights: [tokens], multiply the outputs."""
        if self._grouped and len(tokens):
            ends = counts.to(tokens.device).cumsum(0, dtype=torch.int32)
            grouped = torch.nn.functional.grouped_mm
            gate, up = grouped(tokens, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, 1)
            out = grouped(silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        else:
            parts = tokens.split(counts.tolist())
            rows = zip(parts, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
            out = torch.cat([_feed_forward(*row) for row in rows])
        return (out * weights.unsqueeze(1)).to(tokens.dtype), None


def _feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = linear(x, gate_up).chunk(2, 1)
    return linear(silu(gate) * up, down)


def allow_uneven_tokens(dispatcher: Any) -> None:
    """Let Megatron's all-gather ``dispatcher`` work on ranks with different numbers of tokens, by padding with tokens that
    are routed nowhere.
    """
    before, after = dispatcher.dispatch_preprocess, dispatcher.combine_postprocess
    shapes: list[torch.Size] = []  # of the layer's input

    def dispatch_preprocess(hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        shapes[:] = [hidden.shape]
        rows = hidden.flatten(0, -2)
        most = torch.tensor(len(rows), device=rows.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=dispatcher.tp_ep_group)
        padding = (0, 0, 0, int(most) - len(rows))
        result: tuple[Tensor, Tensor] = before(pad(rows, padding), pad(routing_map, padding), pad(probs, padding))
        return result

    def combine_postprocess(hidden: Tensor) -> Tensor:
        (shape,) = shapes
        rows: Tensor = after(hidden)
        return rows[: shape[:-1].numel()].view(shape)

    dispatcher.dispatch_preprocess, dispatcher.combine_postprocess = dispatch_preprocess, combine_postprocess
