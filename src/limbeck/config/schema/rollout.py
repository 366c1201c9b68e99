"""On-policy distillation: which share of the samples the student writes itself, and how."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from limbeck.config.schema.base import Section, registered
from limbeck.registry import GENERATORS


def _low_and_high(clip: list[float]) -> list[float]:
    if len(clip) != 2 or not (0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(
            "is not a range; write [low, high] with low from 0 to 1 and high of 0 or more, such as [0.2, 0.2]"
        )
    return clip


Clip = Annotated[list[float], AfterValidator(_low_and_high)]


class StopIf(Section):
    """Limits on the answers that the student writes. The run ends if one of them is passed in several steps in a row."""

    truncated_share: float | None = Field(
        default=None, gt=0, le=1, description="At least this share of a step's answers is cut off at max_new_tokens."
    )
    repeated_share: float | None = Field(
        default=None, gt=0, le=1, description="At least this share of a step's answers ends in a loop."
    )
    empty_share: float | None = Field(
        default=None, gt=0, le=1, description="At least this share of a step's answers has nothing before its end."
    )
    mean_length_below: float | None = Field(
        default=None, gt=0, description="A step's answers have fewer tokens than this on average."
    )
    for_steps: int = Field(default=20, ge=1, description="Number of steps in a row.")


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
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="Steps by which the weights that write may be older than those that are trained. 0 writes each step with "
        "the weights that it trains. With n, step s is written with the weights after step s - n while earlier steps train; "
        "the first n + 1 steps are written with the first weights. Each rank holds a copy of the weights.",
    )
    stop_if: StopIf | None = Field(
        default=None, description="Ends the run with a checkpoint and an error if the student's answers degenerate."
    )
    generator: Annotated[str, registered(GENERATORS)] = Field(
        default="hf",
        description="The engine that writes: hf (in the training process), or one that a plug-in registers.",
    )
    policy_clip: Clip | None = Field(
        default=[0.2, 0.2],
        description="[low, high]: the policy gradient of kd_objective: policy_gradient and of rewards clips the ratio of a "
        "token's probabilities, now and when it was written, to 1 - low and 1 + high. null does not clip.",
    )
    reward_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the rewards of an environment, which are added to the loss as a policy gradient. The advantage "
        "of a sample is its reward minus the mean reward of the samples of its prompt.",
    )
    log_prob_gap_limit: float = Field(
        default=0.1,
        gt=0,
        description="Difference between the generator's and the student's log-probability of a written token from which the "
        "token counts for rollout/log_prob_gap_share. A warning is printed if the mean difference is larger.",
    )
    generator_kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the generator.")

    @property
    def truncates(self) -> bool:
        """Whether the student writes from a part of the vocabulary, in which tokens have other probabilities."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)
