"""Lets Megatron's own MambaModel run on a CPU without Transformer Engine and mamba-ssm, for ``write_megatron_checkpoints``.

The layers, their parameters and their sharded state dicts are Megatron's. Kernels of mamba-ssm are replaced by the recurrence
that they compute, one position after the other, and Transformer Engine's modules by Megatron's local ones, whose norms get
Transformer Engine's names in the format torch_dist.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus


class GatedRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, group_size: int, norm_before_gate: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self._eps, self._group = eps, group_size

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        groups = (x * silu(z)).unflatten(-1, (-1, self._group))
        return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self._eps)).flatten(-2) * self.weight


def scan(x, dt, A, B, C, chunk_size, D, dt_bias, **unused) -> Tensor:
    """x: [batch, time, heads, dim]. dt: [batch, time, heads]. B, C: [batch, time, groups, state]."""
    heads, steps = x.shape[2], softplus(dt + dt_bias)
    B, C = (part.repeat_interleave(heads // part.shape[2], 2) for part in (B, C))
    state, outputs = torch.zeros(x.shape[0], heads, x.shape[3], B.shape[3]), []
    for t in range(x.shape[1]):
        step = steps[:, t, :, None, None]
        state = state * torch.exp(step * A[:, None, None]) + step * x[:, t, :, :, None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1) + x[:, t] * D[:, None])
    return torch.stack(outputs, 1)


def _module(name: str, **content: object) -> None:
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(content)


for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
    _module(package)
_module("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=GatedRMSNorm)
# 0.19 reads the arguments of both kernels; without its memory-efficient path, it calls the first one only.
_module("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=scan, mamba_split_conv1d_scan_combined=scan)
_module("mamba_ssm.ops.triton.selective_state_update", selective_state_update=None)

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.mamba import MambaModel  # noqa: E402
from megatron.core.ssm import mamba_block  # noqa: E402
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules  # noqa: E402
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules  # noqa: E402
from megatron.core.ssm.mlp_layer import MLPLayer  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules  # noqa: E402

# Where the module of the stack reads it: in 0.19, mamba_block has other names for those of another one.
vars(sys.modules[mamba_block.MambaStack.__module__])["TENorm"] = WrappedTorchNorm

STACK = ModuleSpec(
    module=mamba_block.MambaStack,
    submodules=mamba_block.MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=WrappedTorchNorm,
                mixer=ModuleSpec(
                    module=MambaMixer,
                    submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
                ),
                mamba_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=ModuleSpec(
                    module=SelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=ColumnParallelLinear,
                        core_attention=DotProductAttention,
                        linear_proj=RowParallelLinear,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=ModuleSpec(
                    module=MLP,
                    submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
                ),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
    ),
)

__all__ = ["STACK", "MambaModel"]
