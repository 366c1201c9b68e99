"""Options of megatron_train and megatron_infer, under the names that Megatron and ROLL give them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from limbeck.config.schema.base import Section

_NOT_RECOMPUTED = {
    "moe_act": "is an activation inside of Megatron's own experts, in place of which Limbeck's are used; use moe, which "
    "recomputes the whole layer",
    "shared_experts": "are not recomputed alone; use moe, which recomputes the whole layer",
    "mla_up_proj": "belongs to multi-latent attention, which is not built for megatron; remove it",
    "gdn_norm_out": "belongs to gated delta nets, which are not built for megatron; remove it",
}
"""Megatron's other names of modules, and why they cannot be recomputed."""


class MegatronConfig(Section):
    """Options of Megatron. They change results by rounding only."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto",
        description="Modules of the matrices and norms in layers: local (Megatron's and PyTorch's) or transformer_engine, "
        "which needs a GPU and pip install 'transformer-engine[pytorch]'. auto is local.",
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        default=None,
        ge=2,
        description="Number of groups of layers on each pipeline stage, which the interleaved schedule alternates between to "
        "idle less. The micro-batches of a step must be a multiple of pipeline_model_parallel_size.",
    )
    account_for_embedding_in_pipeline_split: bool = Field(
        default=False, description="Count the embeddings as a layer when layers are divided into stages."
    )
    account_for_loss_in_pipeline_split: bool = Field(
        default=False, description="Count the output head and the loss as a layer when layers are divided into stages."
    )
    num_layers_in_first_pipeline_stage: int | None = Field(
        default=None,
        ge=1,
        description="Number of layers of the first pipeline stage. The others divide the rest evenly.",
    )
    num_layers_in_last_pipeline_stage: int | None = Field(
        default=None,
        ge=1,
        description="Number of layers of the last pipeline stage. The others divide the rest evenly.",
    )
    expert_model_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Number of ranks that divide the experts of each layer between them (mixtures of experts). They are data "
        "and context parallel ranks, and also tensor parallel ranks if expert_tensor_parallel_size is 1.",
    )
    expert_tensor_parallel_size: int | None = Field(
        default=None,
        ge=1,
        description="Number of ranks that split every matrix of an expert: 1, or tensor_model_parallel_size, the default.",
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = Field(
        default="alltoall",
        description="How tokens reach the ranks of their experts: alltoall sends each token to its experts only, allgather "
        "every token to all ranks.",
    )
    moe_grouped_gemm: bool = Field(
        default=False,
        description="Multiply the matrices of all experts of a rank in one grouped operation, with PyTorch 2.10 or later, "
        "instead of one expert after the other.",
    )
    moe_router_dtype: Literal["fp32", "fp64"] | None = Field(
        default=None,
        description="Data type in which the router computes the weights of experts. If unset, that of the model.",
    )
    use_distributed_optimizer: bool = Field(
        default=False,
        description="Shard the optimizer state and the float32 copies of the parameters over the data parallel ranks.",
    )
    recompute_granularity: Literal["full", "selective"] | None = Field(
        default=None,
        description="Activation checkpointing: full recomputes layers, selective recomputes recompute_modules. If unset, "
        "model_args.disable_gradient_checkpointing decides between full and none.",
    )
    recompute_method: Literal["uniform", "block"] = Field(
        default="uniform",
        description="With full recomputation: uniform recomputes all layers, recompute_num_layers at a time; block recomputes "
        "the first recompute_num_layers layers of each stage.",
    )
    recompute_num_layers: int = Field(default=1, ge=1, description="Number of layers for recompute_method.")
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe"]] | None = Field(
        default=None,
        description="What selective recomputation recomputes: core_attn, layernorm, mlp (layers without experts) or moe "
        "(layers with experts). layernorm needs transformer_impl: transformer_engine. If unset, core_attn.",
    )
    overlap_grad_reduce: bool = Field(
        default=False, description="Reduce gradients over the data parallel ranks during the backward pass."
    )
    ddp_bucket_size: int | None = Field(
        default=None,
        ge=1,
        description="Number of parameters whose gradients are reduced together with overlap_grad_reduce. If unset, Megatron "
        "chooses it.",
    )
    ddp_average_in_collective: bool = Field(
        default=False, description="Average gradients in the collective operation instead of dividing them before it."
    )

    @field_validator("recompute_modules", mode="before")
    @classmethod
    def _of_limbecks_layers(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("is empty; remove it to recompute core_attn, or name other modules")
        for module in value if isinstance(value, list) else []:
            if str(module) in _NOT_RECOMPUTED:
                raise ValueError(f"has {module}, which {_NOT_RECOMPUTED[str(module)]}")
        return value
