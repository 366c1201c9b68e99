"""Checkpoints of student and teacher: how they are loaded and distributed over the ranks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from limbeck.config.schema.base import CommaList, Dtype, Section, registered
from limbeck.config.schema.megatron import MegatronConfig
from limbeck.registry import OFFLOADS, READS_DEEPSPEED_BLOCK, READS_MEGATRON_KEYS, STRATEGIES


class ModelArgs(Section):
    """A checkpoint and how it is loaded."""

    model_name_or_path: str | None = Field(
        default=None,
        description="Folder or Hugging Face id of the checkpoint, or a folder of checkpoints of Megatron-LM. If unset, "
        "`student_pretrain` or `teacher_pretrain`.",
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the Hugging Face hub. If unset, the main branch."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the checkpoint. Set it only for sources you trust.",
    )
    model_config_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Values that replace those in the checkpoint's config.json. With from_scratch and no checkpoint, "
        "the whole model configuration, including `model_type`.",
    )
    megatron_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of Megatron-LM that describe the model, such as `num_layers`. With a checkpoint of Megatron-LM "
        "they replace those in it. For a student without a checkpoint they are the whole description of a model with random "
        "weights. `tokenizer_model` is the folder or hub id of its tokenizer; if unset, `tokenizer`.",
    )
    from_scratch: bool = Field(
        default=False,
        description="Initialise the model with random weights instead of loading the checkpoint's.",
    )
    dtype: Dtype = Field(
        default="bf16",
        description="Data type of the model's computation: fp32, bf16 or fp16. PyTorch's names, such as bfloat16, are "
        "accepted.",
    )
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = Field(
        default="auto",
        description="Attention implementation; auto lets transformers choose, fa2 is short for flash_attention_2. "
        "flash_attention_2 is auto without a GPU and the package flash-attn; flex_attention needs a GPU to train.",
    )

    @property
    def names_a_model(self) -> bool:
        """Whether there is a model to load or to initialise."""
        new = bool(self.megatron_arguments) or (self.from_scratch and "model_type" in self.model_config_kwargs)
        return self.model_name_or_path is not None or new


class StudentModelArgs(ModelArgs):
    """The checkpoint that the student starts from, and which of its parameters are trained."""

    disable_gradient_checkpointing: bool | None = Field(
        default=None,
        description="true keeps all activations (faster); false recomputes them in the backward pass (less memory). If "
        "unset, they are recomputed only where they do not fit on the GPU by the estimate of `limbeck plan`.",
    )
    gradient_checkpointing_use_reentrant: bool | None = Field(
        default=None, description="Use PyTorch's reentrant gradient checkpointing. If unset, the non-reentrant variant."
    )
    freeze_module_prefix: CommaList | None = Field(
        default=None, description="Name prefixes of the parameters that are not trained, separated by commas."
    )
    unfrozen_parameters: list[str] | None = Field(
        default=None,
        description="Names of the parameters that are trained; all others are frozen. A list, or a YAML file with the key "
        "unfrozen_parameters, as `limbeck spectrum` and Spectrum write it. An entry that matches no parameter is an error.",
    )
    frozen_parameters: list[str] | None = Field(
        default=None,
        description="Names of parameters that are not trained; they take precedence over unfrozen_parameters. An entry that "
        "matches no parameter is an error.",
    )
    parameter_match: Literal["substring", "regex"] = Field(
        default="substring",
        description="How unfrozen_parameters and frozen_parameters match the names of parameters: substring (the entry is a "
        "part of the name) or regex (the regular expression matches a part of the name).",
    )
    lora_target: CommaList | None = Field(
        default=None,
        description="Modules that get LoRA adapters: names separated by commas, a regular expression, or all-linear. "
        "If "
        "unset, LoRA is not used.",
    )
    lora_rank: int = Field(default=8, ge=1, description="Rank of the LoRA adapters.")
    lora_alpha: int | None = Field(
        default=None, ge=1, description="LoRA alpha: adapters are scaled by alpha / rank. If unset, 2 x lora_rank."
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout probability of the input of the LoRA adapters."
    )
    additional_target: CommaList | None = Field(
        default=None,
        description="Modules that are trained in full in addition to LoRA, separated by commas, such as "
        "embed_tokens,lm_head.",
    )


class StrategyConfig(Section):
    """Options of a strategy. They change results by rounding only."""

    fsdp_size: int | None = Field(
        default=None,
        ge=2,
        description="Number of ranks that shard one copy of the model; each such group holds a replica. If unset, or "
        "at "
        "least the number of ranks, all ranks shard one copy.",
    )
    tensor_model_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Tensor parallel size: number of neighbouring ranks that split every weight matrix.",
    )
    context_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Context parallel size (Ulysses): number of ranks that split every sequence.",
    )
    pipeline_model_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Pipeline parallel size: number of ranks that split the layers into consecutive stages.",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Split the sequence dimension of norms and residuals over the tensor parallel ranks. It has no "
        "effect "
        "without tensor parallelism.",
    )
    tensor_parallel_plan: dict[str, str] | str | None = Field(
        default=None,
        description="How tensor parallelism slices the model: patterns of module names and styles, such as "
        "`{layers.*.mlp.up_proj: colwise, layers.*.mlp.down_proj: rowwise}`, or the dotted path of such a mapping in a Python "
        "module, which is imported. If unset, by the plan that comes with the model.",
    )
    replicate: bool = Field(
        default=False,
        description="Keep a whole copy of the model on every rank instead of sharding it, like ZeRO stage 0.",
    )
    reshard_after_forward: bool | None = Field(
        default=None,
        description="Free gathered parameters after the forward pass (less memory, one more all-gather). If unset, "
        "true.",
    )
    offload_policy: bool = Field(
        default=False,
        description="Keep the parameters in host memory and copy each layer to the GPU for its passes, which is slower and "
        "needs less GPU memory. The student's gradients and optimizer are in host memory too, and it needs several ranks; "
        "deepspeed_train offloads a student on one.",
    )
    param_dtype: Dtype | None = Field(
        default=None,
        description="Data type of the gathered parameters and of the computation. If unset, `model_args.dtype`.",
    )
    reduce_dtype: Dtype = Field(default="fp32", description="Data type in which gradients are reduced over the ranks.")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed configuration, such as zero_optimization, for deepspeed_train and deepspeed_infer. Its "
        "keys may also be written directly in strategy_config. Values that other keys of the run set must be auto.",
    )
    megatron: MegatronConfig = Field(
        default_factory=MegatronConfig,
        description="Options of megatron_train and megatron_infer. They may also be written directly in strategy_config.",
    )

    @property
    def ranks_of_a_model(self) -> int:
        """Number of ranks of one model-parallel copy of the model."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size


def reads_deepspeed_block(strategy_name: object) -> bool:
    """Whether a strategy reads ``strategy_config.deepspeed``."""
    return STRATEGIES.has_trait(strategy_name, READS_DEEPSPEED_BLOCK)


def reads_megatron_keys(strategy_name: object) -> bool:
    """Whether a strategy reads ``strategy_config.megatron``."""
    return STRATEGIES.has_trait(strategy_name, READS_MEGATRON_KEYS)


class StrategyArgs(Section):
    """How a model is distributed over the ranks."""

    strategy_name: Annotated[str, registered(STRATEGIES)] | None = Field(
        default=None,
        description="Strategy that distributes the model: fsdp2_train, deepspeed_train or megatron_train for the student; "
        "fsdp2_infer, deepspeed_infer, megatron_infer or hf_infer (a whole copy on each rank) for the teacher; or one that a "
        "plug-in registers. If unset, one rank holds the whole model and several ranks use FSDP2.",
    )
    strategy_config: StrategyConfig = Field(default_factory=StrategyConfig, description="Options of the strategy.")

    @property
    def reads_deepspeed_block(self) -> bool:
        """Whether the strategy reads ``strategy_config.deepspeed``."""
        return reads_deepspeed_block(self.strategy_name)

    @property
    def offloads(self) -> bool:
        """Whether the strategy moves models to host memory and back between steps; the default strategy does."""
        return self.strategy_name is None or STRATEGIES.has_trait(self.strategy_name, OFFLOADS)
