"""The settings of Megatron's layers."""

from __future__ import annotations

from typing import Any

import torch

from limbeck.config.schema import MegatronConfig
from limbeck.models.megatron_families import ExpertShape, Family, Heads
from limbeck.strategies.megatron.core import import_megatron
from limbeck.strategies.parallel_dims import ParallelDims


def transformer_config(
    config: Any, dims: ParallelDims, dtype: torch.dtype, given: MegatronConfig, *, recompute: bool, family: Family
) -> Any:
    """Megatron's settings of the layers of a Hugging Face configuration, which are divided by ``dims``.

    Raises:
        AssertionError, ValueError: Megatron's own, for settings that it refuses.
    """
    core, heads, virtual = import_megatron(), Heads.of(config), given.virtual_pipeline_model_parallel_size
    return core.transformer.TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads.heads,
        num_query_groups=heads.groups,
        kv_channels=heads.dim,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=dims.tp,
        sequence_parallel=dims.sequence_parallel and dims.tp > 1,
        # Context parallelism is in CoreAttention; Megatron's own needs Transformer Engine.
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=given.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=given.num_layers_in_last_pipeline_stage,
        account_for_embedding_in_pipeline_split=given.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=given.account_for_loss_in_pipeline_split,
        # With Megatron's defaults, interleaved stages exchange their messages and train on wrong activations, silently.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        transformer_impl="transformer_engine" if given.transformer_impl == "transformer_engine" else "local",
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_architecture(config, dims, given, family),
        **_recomputation(given, recompute=recompute),
    )


def _architecture(config: Any, dims: ParallelDims, given: MegatronConfig, family: Family) -> dict[str, Any]:
    """Megatron's settings of layers that depend on the family and on the Hugging Face configuration."""
    from megatron.core.activations import squared_relu

    usual = _expert_settings(config, dims, given)
    if not family.settings:
        return usual | {
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.layer_norm_epsilon if family.hybrid else config.rms_norm_eps,
            "gated_linear_unit": family.activation != "relu2",
            "activation_func": squared_relu if family.activation == "relu2" else torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": family.qkv_bias,
            "qk_layernorm": family.qk_norm,
        }
    precision = {"moe_router_dtype": given.moe_router_dtype} if given.moe_router_dtype else {}
    return {**usual, **family.settings, **precision}


def _expert_settings(config: Any, dims: ParallelDims, given: MegatronConfig) -> dict[str, Any]:
    """Megatron's settings of a mixture of experts; none for a dense model."""
    experts = ExpertShape.of(config)
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.active,
        "moe_ffn_hidden_size": experts.width,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_load_balancing_type": "none",
        "moe_router_bias_update_rate": 0.0,
        "moe_router_dtype": given.moe_router_dtype,
        "moe_token_dispatcher_type": given.moe_token_dispatcher_type,
        "moe_grouped_gemm": given.moe_grouped_gemm,
        "expert_model_parallel_size": dims.ep,
        "expert_tensor_parallel_size": dims.etp,
    }


def _recomputation(given: MegatronConfig, *, recompute: bool) -> dict[str, Any]:
    """Megatron's settings of activation checkpointing; of every layer where only ``recompute`` wants it."""
    granularity = given.recompute_granularity or ("full" if recompute else None)
    if granularity != "full":
        modules = {} if given.recompute_modules is None else {"recompute_modules": given.recompute_modules}
        return {"recompute_granularity": granularity, **modules}
    return {
        "recompute_granularity": "full",
        "recompute_method": given.recompute_method,
        "recompute_num_layers": given.recompute_num_layers,
    }
