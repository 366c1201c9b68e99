"""Transformer Engine's matrices and norms in Megatron's layers. Attention stays Limbeck's, so packing works as ever.

A norm and the matrix after it are one module there, so the norm's weight has another name; see
``limbeck.models.megatron_families.FUSED_NORMS``.
"""

from __future__ import annotations

from typing import Any

from limbeck.errors import LimbeckError
from limbeck.strategies.megatron.core import import_megatron, submodules_of

_OLDEST = "1.9.0"  # Megatron computes the norms of queries and keys with Apex before


def check_transformer_engine(role: str) -> None:
    """Raise LimbeckError unless Transformer Engine is installed."""
    import_megatron()
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.utils import is_te_min_version

    if not HAVE_TE or not is_te_min_version(_OLDEST):
        raise LimbeckError(
            f"{role}.strategy_args.strategy_config.transformer_impl = transformer_engine needs Transformer Engine {_OLDEST} or "
            "later; pip install 'transformer-engine[pytorch]', or use local."
        )


def use_transformer_engine(layer: Any, *, experts: bool) -> None:
    """Replace the matrices and norms in the submodules of a local ``layer``. Its experts and its router are not replaced."""
    from megatron.core.extensions import transformer_engine as engine
    from megatron.core.transformer.identity_op import IdentityOp

    attention = layer.self_attention.submodules
    attention.linear_qkv = engine.TELayerNormColumnParallelLinear
    attention.linear_proj = engine.TERowParallelLinear
    layer.input_layernorm = IdentityOp
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = engine.TENorm
    if experts:
        layer.pre_mlp_layernorm = engine.TENorm
        return
    mlp = submodules_of(layer.mlp)
    mlp.linear_fc1, mlp.linear_fc2 = engine.TELayerNormColumnParallelLinear, engine.TERowParallelLinear
    layer.pre_mlp_layernorm = IdentityOp


def transformer_engine_norm() -> Any:
    """The module of a norm that no matrix follows."""
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
