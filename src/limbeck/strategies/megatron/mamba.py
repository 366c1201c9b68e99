"""A Mamba-2 layer among the layers of Megatron's GPTModel, with the parameter names of Megatron's MambaModel.

Tensor-parallel ranks have some of the heads each, and the groups that belong to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.models.megatron_families import MambaSizes
from limbeck.strategies.megatron.core import import_megatron
from limbeck.strategies.megatron.layers import AttentionInputs, RMSNorm
from limbeck.strategies.megatron.ssd import causal_convolution, gated_norm, scan


class MambaMixer(nn.Module):
    """The layer without norm and residual.

    Args:
        config: Megatron's TransformerConfig.
        tensor: the group of tensor-parallel ranks.
        sizes: of the whole layer.
    """

    def __init__(self, config: Any, tensor: Any, sizes: MambaSizes) -> None:
        super().__init__()
        parallel, ranks = import_megatron().tensor_parallel, tensor.size()
        self.sizes, self._heads, self._groups = sizes, sizes.heads // ranks, sizes.groups // ranks
        where = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        whole = {"config": config, "bias": False, "tp_group": tensor}
        self.in_proj = parallel.ColumnParallelLinear(
            config.hidden_size,
            sum(sizes.sections("mamba_in")),
            init_method=config.init_method,
            gather_output=False,
            **whole,
        )
        channels = sum(sizes.sections("mamba_conv")) // ranks
        self.conv1d = nn.Conv1d(channels, channels, sizes.width, groups=channels, **where)
        self.norm = nn.RMSNorm(self._heads * sizes.dim, **where)  # only its weight is used
        self.out_proj = parallel.RowParallelLinear(
            sizes.heads * sizes.dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=False,
            **whole,
        )
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self._heads, **where)) for _ in range(3))
        for parameter in (*self.conv1d.parameters(), self.norm.weight, self.dt_bias, self.A_log, self.D):
            # Every rank has others, so all count in the norm of the gradients.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, documents: Tensor | None) -> Tensor:
        """hidden: [time, batch, hidden], or a part of the time with sequence parallelism; returns the same shape."""
        sizes = self.sizes
        inner, states = self._heads * sizes.dim, self._groups * sizes.state
        projected = self.in_proj(hidden)[0].transpose(0, 1)  # [batch, time, channels]
        gate, channels, steps = projected.split([inner, inner + 2 * states, self._heads], -1)
        channels = causal_convolution(channels, self.conv1d.weight, self.conv1d.bias, documents)
        # States and steps need float32: small steps add up over the row.
        x, b, c = torch.nn.functional.silu(channels).float().split([inner, states, states], -1)
        x = x.unflatten(-1, (self._heads, -1))
        steps = torch.nn.functional.softplus(steps.float() + self.dt_bias).clamp(min=sizes.smallest_step)
        b, c = (part.unflatten(-1, (self._groups, -1)) for part in (b, c))
        y = scan(x, steps, -self.A_log.float().exp(), b, c, sizes.chunk, documents) + x * self.D.unsqueeze(-1)
        y = gated_norm(y.flatten(2), gate.float(), self.norm.weight, self._groups, sizes.eps).to(hidden.dtype)
        output: Tensor = self.out_proj(y.transpose(0, 1))[0]
        return output


class MambaLayer(nn.Module):
    """Norm, mixer and residual. Megatron's TransformerBlock builds and calls it as one of its layers."""

    def __init__(
        self,
        config: Any,
        sizes: MambaSizes,
        layer_number: int = 1,
        pg_collection: Any = None,
        vp_stage: int | None = None,
        **unused: Any,
    ) -> None:
        from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

        super().__init__()
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.norm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.mixer = MambaMixer(config, pg_collection.tp, sizes)

    def forward(self, hidden_states: Tensor, packed_seq_params: AttentionInputs, **unused: Any) -> tuple[Tensor, None]:
        """hidden_states: [time, batch, hidden]. The second result is the context of layers with cross attention."""
        return hidden_states + self.mixer(self.norm(hidden_states), packed_seq_params.documents), None
