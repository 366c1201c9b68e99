"""On-policy distillation: which share of the samples the student writes itself, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from limbeck.config.schema.base import Devices, Section, registered
from limbeck.config.schema.origins import OriginObjectives
from limbeck.config.schema.schedules import (
    AdaptiveSchedule,
    Fraction,
    FractionSchedule,
    OnPolicyFraction,
    schedule_of,
)
from limbeck.registry import ENVIRONMENTS, GENERATORS

ENVIRONMENT_KWARGS: dict[str, tuple[str, ...]] = {
    "math": ("answer_key", "workers", "seconds"),
    "exact": ("answer_key",),
}
"""The environment_kwargs that each built-in environment reads."""


def _low_and_high(clip: list[float]) -> list[float]:
    if len(clip) != 2 or not (0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(
            "is not a range; write [low, high] with low from 0 to 1 and high of 0 or more, such as [0.2, 0.2]"
        )
    return clip


def _not_empty(texts: list[str]) -> list[str]:
    if "" in texts:
        raise ValueError("has an empty text, which would end every answer at its first token; remove it")
    return texts


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
    mean_length_above: float | None = Field(
        default=None, gt=0, description="A step's answers have more tokens than this on average."
    )
    for_steps: int = Field(default=20, ge=1, description="Number of steps in a row.")


class ReplayConfig(Section):
    """Earlier samples of the student that are trained on again."""

    fraction: Fraction = Field(
        default=0.0,
        description="Share of the samples named by replaces in whose place the student is trained on samples that it wrote in "
        "earlier steps: a number, or a schedule as in on_policy_fraction, but not adaptive. Decided for each sample from the "
        "seed, the step and the row. 0 for no replay.",
    )
    replaces: Literal["off_policy", "student"] = Field(
        default="off_policy",
        description="Whose place replayed samples take: off_policy (samples that the student does not write) or student "
        "(samples that it would write in this step; only once the buffer is full, as in DistiLLM).",
    )
    capacity: int = Field(
        default=512,
        ge=1,
        description="Number of the student's newest samples from which a replayed one is drawn. They are part of the "
        "checkpoint.",
    )

    @property
    def schedule(self) -> FractionSchedule:
        """``fraction`` as a schedule."""
        schedule = schedule_of(self.fraction)
        assert isinstance(schedule, FractionSchedule)
        return schedule

    @property
    def is_used(self) -> bool:
        """Whether anything is replayed."""
        return max(self.schedule.start, self.schedule.end) > 0


class RolloutConfig(Section):
    """Samples that the student writes during training. The prompts are those of the training rows."""

    on_policy_fraction: OnPolicyFraction = Field(
        default=1.0,
        description="Share of the samples that the student writes (lambda in GKD): a number, or a schedule {start, end, steps, "
        "shape} that changes it over so many steps with the shape linear (the default) or cosine; share in place of steps is a "
        "share of the run. {shape: adaptive, start, end, increment, tolerance, metric} adds increment (0.1), up to end (1), "
        "after each validation whose metric (val/loss) is at least tolerance (0) above its value at the last increase. "
        "Decided for each sample from the seed, the step and the row. off_policy writes the others.",
    )
    off_policy: Literal["dataset", "teacher"] = Field(
        default="dataset",
        description="Who writes the answers that the student does not write: dataset (those of the data are used) or teacher "
        "(the teacher writes them in the student's processes, as in sequence-level distillation; a row gets the same answer in "
        "every epoch, and each rank holds the whole teacher a second time, with offload only while it writes).",
    )
    replay: ReplayConfig = Field(
        default_factory=ReplayConfig, description="Earlier samples of the student that are trained on again."
    )
    objectives: OriginObjectives = Field(
        default_factory=OriginObjectives, description="Objectives of the samples, by who wrote them."
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
    stop_strings: Annotated[list[str], AfterValidator(_not_empty)] = Field(
        default_factory=list, description="Texts that end an answer."
    )
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
    steps_per_rollout: int = Field(
        default=1,
        ge=1,
        description="Number of optimizer steps whose samples are written together, with the weights before the first of them. "
        "A policy gradient compares with the probabilities under those weights.",
    )
    stop_if: StopIf | None = Field(
        default=None, description="Ends the run with a checkpoint and an error if the student's answers degenerate."
    )
    generator: Annotated[str, registered(GENERATORS)] = Field(
        default="hf",
        description="The engine that writes: hf (the student's own model, in the training process), vllm (needs "
        "limbeck[vllm]; also in the training process, unless device_mapping is set), or one that a plug-in registers.",
    )
    device_mapping: Devices = Field(
        default=None,
        description="Devices of the generator's own, numbered like those of student.device_mapping and on the same machine: "
        "[6, 7]. vllm runs an engine in other processes on each, or on every generator_kwargs.tensor_parallel_size of them, "
        "and weights are sent to it directly. If unset, the generator shares the student's devices.",
    )
    generator_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the generator. hf: slots, the number of answers that are written at a time (64), and copy: "
        "true (each rank writes with a whole copy of the student's weights), false (in lockstep: all ranks write together with "
        "the student itself, and each token gathers its layers) or auto (a copy, unless limbeck plan finds that it does not "
        "fit on the GPUs; the default). vllm: those of vllm.LLM, such as gpu_memory_utilization.",
    )
    offload: bool = Field(
        default=False,
        description="Free the generator's devices after each writing and load it again before the next one: hf moves its copy "
        "of the weights to host memory, and vllm sleeps. With is_offload_states that is always so.",
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
        "token counts for rollout/log_prob_gap_share. A warning is printed if the mean difference is larger in steps that the "
        "current weights have written.",
    )
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
    environment_seconds: float | None = Field(
        default=300,
        gt=0,
        le=86400,
        description="Time limit of one call of an environment that a plug-in registers. The rewards of a call that takes "
        "longer are not known, and the call goes on in its thread beside later ones. Signal handlers cannot be set in that "
        "thread; null calls the environment in the main thread, without a limit.",
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

    @property
    def in_lockstep(self) -> bool:
        """Whether all ranks write together with the student itself, and not with copies of its weights."""
        return self.generator == "hf" and self.generator_kwargs.get("copy") is False

    @property
    def slots(self) -> int:
        """Number of answers that a model in the training process writes at a time."""
        return int(self.generator_kwargs.get("slots", 64)) if self.generator == "hf" else 64

    @property
    def truncates(self) -> bool:
        """Whether the student writes from a part of the vocabulary, in which tokens have other probabilities."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)

    @property
    def schedule(self) -> FractionSchedule | AdaptiveSchedule:
        """``on_policy_fraction`` as a schedule."""
        return schedule_of(self.on_policy_fraction)

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins that samples of the run can have, among ``ORIGINS``."""
        least, most = sorted((self.schedule.start, self.schedule.end))
        replays = self.replay.is_used and most > 0 and (least < 1 or self.replay.replaces == "student")
        return (
            *(("student",) if most > 0 else ()),
            *((self.off_policy,) if least < 1 else ()),
            *(("replay",) if replays else ()),
        )


class ValidationRolloutConfig(Section):
    """Validation by writing: the student answers the validation prompts, and rollout.environment compares the answers.

    Rows may lack an answer, which the loss alone needs.
    """

    max_samples: int | None = Field(
        default=None, ge=1, description="Number of validation rows that are answered, the first ones. If unset, all."
    )
    num_generations: int = Field(default=1, ge=1, description="Answers to each validation row.")
    temperature: float | None = Field(default=None, ge=0, description="If unset, rollout.temperature.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="If unset, rollout.top_p.")
    top_k: int | None = Field(default=None, ge=0, description="If unset, rollout.top_k.")
    max_new_tokens: int | None = Field(default=None, ge=1, description="If unset, rollout.max_new_tokens.")
    print_samples: int = Field(default=5, ge=0, description="Number of answers that are printed.")
