"""On-policy distillation: which share of the samples the student writes itself, and how."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from limbeck.config.schema.base import Section, registered
from limbeck.registry import ENVIRONMENTS, GENERATORS

ENVIRONMENT_KWARGS: dict[str, tuple[str, ...]] = {
    "math": ("answer_key", "workers", "seconds"),
    "exact": ("answer_key",),
}
"""The environment_kwargs that each built-in environment reads."""


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
        description="The engine that writes: hf (in the training process), or one that a plug-in registers.",
    )
    generator_kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the generator.")
    environment: Annotated[str, registered(ENVIRONMENTS)] | None = Field(
        default=None,
        description="What rewards the answers that the student writes: math (1 for the right expression, compared by "
        "math-verify), exact (1 for the right number or text), or one that a plug-in registers. If unset, there "
        "are no rewards.",
    )
    environment_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the environment. math and exact read answer_key, the column of the reference answer (by "
        "default the top-level answer_key); math also reads workers, the number of processes that compare answers (2), and "
        "seconds, the time limit of one comparison (10).",
    )
    max_turns: int = Field(
        default=1,
        ge=1,
        description="Maximum number of completions in one answer. After each one but the last, the student goes on if the "
        "environment replies.",
    )
    save_samples: bool = Field(
        default=False,
        description="Write the samples of each training step to `<output_dir>/rollouts/train-<step>.jsonl`.",
    )


class ValidationRolloutConfig(Section):
    """Validation by writing: the student answers the validation prompts, and rollout.environment compares the answers."""

    max_samples: int | None = Field(
        default=None, ge=1, description="Number of validation rows that are answered, the first ones. If unset, all."
    )
    num_generations: int = Field(default=1, ge=1, description="Answers to each validation row.")
    temperature: float | None = Field(default=None, ge=0, description="If unset, rollout.temperature.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="If unset, rollout.top_p.")
    top_k: int | None = Field(default=None, ge=0, description="If unset, rollout.top_k.")
    max_new_tokens: int | None = Field(default=None, ge=1, description="If unset, rollout.max_new_tokens.")
    print_samples: int = Field(default=5, ge=0, description="Number of answers that are printed.")
