"""Which checkpoint student and teacher are, how it is loaded, and how it is spread over the ranks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from limbeck.config.schema.base import CommaList, Dtype, Section


class ModelArgs(Section):
    """Which checkpoint, and how it is loaded."""

    model_name_or_path: str | None = Field(
        default=None,
        description="Folder or Hugging Face id of the checkpoint; unset, `student_pretrain` or `teacher_pretrain`.",
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the Hugging Face hub; unset, the repository's main branch."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Allow the checkpoint to bring and run its own Python code. Only for sources you trust.",
    )
    model_config_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Values that replace those of the checkpoint's config.json; with from_scratch and no checkpoint, "
        "the whole of it (with `model_type`).",
    )
    from_scratch: bool = Field(
        default=False,
        description="Build the architecture with fresh random weights instead of loading the checkpoint's.",
    )
    dtype: Dtype = Field(
        default="bf16",
        description="Number format in which the model computes: fp32, bf16 or fp16 (torch's names work).",
    )
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = Field(
        default="auto",
        description="Attention kernel; auto lets transformers choose, fa2 is short for flash_attention_2. The flash and "
        "flex ones train on GPUs only.",
    )

    @property
    def names_a_model(self) -> bool:
        """Whether there is a model to load or, from scratch, to make."""
        return self.model_name_or_path is not None or (self.from_scratch and "model_type" in self.model_config_kwargs)


class StudentModelArgs(ModelArgs):
    """Which checkpoint the student starts from, and which of its parameters are trained."""

    disable_gradient_checkpointing: bool | None = Field(
        default=None,
        description="True keeps all activations (faster); false recomputes them (far less memory); unset, they are "
        "recomputed on GPUs and kept on CPUs.",
    )
    gradient_checkpointing_use_reentrant: bool | None = Field(
        default=None, description="Which of torch's two checkpointing variants to use; unset, the non-reentrant one."
    )
    freeze_module_prefix: CommaList | None = Field(
        default=None, description="Name prefixes of student parameters that are not trained, separated by commas."
    )
    lora_target: CommaList | None = Field(
        default=None,
        description="Train LoRA adapters on these modules: names separated by commas, a regular expression, or "
        "all-linear.",
    )
    lora_rank: int = Field(default=8, ge=1, description="Rank of the LoRA adapters.")
    lora_alpha: int | None = Field(
        default=None, ge=1, description="Scale of the LoRA adapters (alpha / rank is applied); unset, 2 x lora_rank."
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout probability in front of the LoRA adapters."
    )
    additional_target: CommaList | None = Field(
        default=None,
        description="Modules trained in full beside LoRA, separated by commas, such as embed_tokens,lm_head.",
    )


class StrategyConfig(Section):
    """How a strategy spreads a model over the ranks; none of these keys changes what is computed beyond rounding."""

    fsdp_size: int | None = Field(
        default=None,
        ge=2,
        description="Ranks that share one copy of the model, such groups being replicas of each other; unset, or when "
        "there are no more ranks than this, all ranks share one copy.",
    )
    tensor_model_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Neighbouring ranks among which every matrix is sliced; they work on the same rows (tensor parallelism).",
    )
    context_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Ranks among which the time of every row is divided (Ulysses context parallelism).",
    )
    pipeline_model_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Ranks among which the layers are divided, one stretch of them after the other (pipeline parallelism).",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Between their slices the ranks of tensor_model_parallel_size divide the time of every row, so that norms "
        "and residuals are kept once among them (sequence parallelism); without tensor parallelism it does nothing.",
    )
    replicate: bool = Field(
        default=False,
        description="Keep a whole copy of the model on every rank instead of sharding it (as ZeRO stage 0).",
    )
    reshard_after_forward: bool | None = Field(
        default=None,
        description="Free gathered parameters after the forward pass (less memory, one more gather); unset, true.",
    )
    param_dtype: Dtype | None = Field(
        default=None, description="Number format of the gathered parameters and of compute; unset, `model_args.dtype`."
    )
    reduce_dtype: Dtype = Field(
        default="fp32", description="Number format in which gradients are summed over the ranks."
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed's own configuration (zero_optimization and what stands beside it), for deepspeed_train and "
        "deepspeed_infer; its keys may also stand in strategy_config itself. What the run decides stays auto.",
    )

    @property
    def ranks_of_a_model(self) -> int:
        """Neighbouring ranks that work on the same rows with one model."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size


class StrategyArgs(Section):
    """How one model is spread over the ranks."""

    strategy_name: Literal["hf_infer", "fsdp2_train", "fsdp2_infer", "deepspeed_train", "deepspeed_infer"] | None = (
        Field(
            default=None,
            description="fsdp2_train or deepspeed_train for the student; fsdp2_infer, deepspeed_infer or hf_infer (a whole "
            "copy on each rank) for the teacher; unset, whole on a single rank and FSDP2 on several.",
        )
    )
    strategy_config: StrategyConfig = Field(
        default_factory=StrategyConfig, description="Details of the strategy; see the keys below it."
    )
