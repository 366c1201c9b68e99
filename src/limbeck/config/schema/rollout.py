"""On-policy distillation: which share of the samples the student writes itself, and how."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from limbeck.config.schema.base import Section, registered
from limbeck.registry import GENERATORS


class RolloutConfig(Section):
    """Samples that the student writes during training. The prompts are those of the training rows."""

    on_policy_fraction: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the samples that the student writes (lambda in GKD). The others have the answers of the "
        "data. Decided for each sample from the seed, the step and the row.",
    )
    num_generations: int = Field(
        default=1,
        ge=1,
        description="Samples per prompt. per_device_train_batch_size and gradient_accumulation_steps count samples.",
    )
    max_new_tokens: int = Field(
        default=256, ge=1, description="Maximum number of tokens of an answer that the student writes."
    )
    temperature: float = Field(
        default=1.0, ge=0, description="Divides the logits when the student writes; 0 takes the most likely token."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="The student writes from the smallest set of tokens with this probability."
    )
    top_k: int = Field(
        default=0, ge=0, description="The student writes from this many most likely tokens. 0 takes all tokens."
    )
    stop_strings: list[str] = Field(default_factory=list, description="Texts that end an answer.")
    stop_token_ids: list[int] = Field(
        default_factory=list,
        description="Token ids that end an answer, beside the tokenizer's end token and the token that ends the answers of "
        "the data.",
    )
    generator: Annotated[str, registered(GENERATORS)] = Field(
        default="hf",
        description="The engine that writes: hf (the student's own model, in the training process), vllm (needs "
        "limbeck[vllm]; also in the training process), or one that a plug-in registers.",
    )
    generator_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the generator. hf: slots, the number of answers that are written at a time. vllm: those of "
        "vllm.LLM, such as gpu_memory_utilization.",
    )
