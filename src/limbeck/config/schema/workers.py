"""The two roles: the student, which is trained, and the teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from limbeck.config.schema.base import Devices, Environment, Section, registered
from limbeck.config.schema.data import DataArgs
from limbeck.config.schema.models import ModelArgs, StrategyArgs, StudentModelArgs
from limbeck.config.schema.training import TrainingArgs
from limbeck.registry import TEACHERS

SERVICE_NAME = r"^[A-Za-z0-9._-]+$"
"""Allowed names of a teacher service."""


STUDENT_SOURCES = ("student_initial", "student_average")
"""Teacher sources that are made of the student's own weights."""

TEACHER_SOURCE_KWARGS: dict[str, tuple[str, ...]] = {
    "auto": (),
    "model": (),
    "ray": (),
    "student_initial": (),
    "student_average": ("decay",),
}
"""The teacher.source_kwargs that each built-in teacher source reads."""


Packing = Literal["best_fit_decreasing", "modified_first_fit_decreasing"]


class WorkerConfig(Section):
    """The keys that student and teacher share."""

    model_args: ModelArgs = Field(default_factory=ModelArgs, description="The checkpoint and how it is loaded.")
    strategy_args: StrategyArgs = Field(
        default_factory=StrategyArgs, description="How the model is distributed over the ranks."
    )
    device_mapping: Devices = Field(
        default=None,
        description="Device numbers, one rank each: [0, 1], list(range(0, 8)), range(8) or 0,1,2. If only one role has "
        "a "
        "mapping, both roles share its devices. If the mappings differ, Ray places a worker group for each role. On "
        "machines without GPUs they are CPU slots. If unset, the launcher decides.",
    )
    system_envs: Environment = Field(
        default_factory=dict,
        description="Environment variables of this role's processes. Both roles share their processes unless they have "
        "different devices.",
    )
    backend_timeout: float = Field(
        default=30,
        gt=0,
        description="Minutes that a rank of a worker group waits for another rank or for the teacher before it reports "
        "an "
        "error.",
    )


class TeacherPromptConfig(Section):
    """A prompt that only the teacher reads, such as one with the reference answer."""

    key: str | None = Field(
        default=None,
        description="Column of the teacher's prompt: a text, which takes the place of the row's last question, or a list of "
        "messages, which takes the place of the conversation before the answer.",
    )
    template: str | None = Field(
        default=None,
        description="Jinja template of a text that takes the place of the row's last question for the teacher; its variables "
        "are the columns of the row. Example: `{{ question }} The answer is {{ answer }}`.",
    )
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens of the teacher's prompt. Rows with a longer one are left out and counted. If "
        "unset, sequence_length.",
    )


class TeacherConfig(WorkerConfig):
    """The teacher. It reads the student's batches, so it has no data and no batch sizes of its own."""

    prompt: TeacherPromptConfig | None = Field(
        default=None,
        description="Prompt that the teacher reads in place of the student's; the answer that follows is the same. If unset, "
        "both read the same.",
    )

    service: str | None = Field(
        default=None,
        pattern=SERVICE_NAME,
        description="Name of a running `limbeck serve-teacher` on the Ray cluster at RAY_ADDRESS, which is used "
        "instead of "
        "loading the teacher. teacher.device_mapping then belongs to the service.",
    )
    source: Annotated[str, registered(TEACHERS, "auto")] = Field(
        default="auto",
        description="Where the teacher's signals come from: model (a model in the student's processes), ray (Ray workers), "
        "student_initial (the student before the first step), student_average (a moving average of the student's weights), or "
        "a source that a plug-in registers. auto is ray with a teacher.service or devices of the teacher's own, else model.",
    )
    source_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the teacher source. student_average reads decay (0.999): after each step the average is "
        "decay x average + (1 - decay) x student. A source from a plug-in reads its own.",
    )
    signal: Literal["auto", "hidden_states", "top_k", "sampled_token", "logits"] = Field(
        default="auto",
        description="What a teacher in other processes sends for each supervised token: hidden_states (the exact "
        "distribution; the output head is sent once), top_k (the logits_topk most likely tokens), sampled_token (the "
        "log-probability of the label) or logits (the whole vocabulary). auto is top_k with logits_topk, sampled_token "
        "with a kd_objective on the sampled token, else hidden_states.",
    )


class StudentConfig(WorkerConfig):
    """The model that is trained."""

    model_args: StudentModelArgs = Field(
        default_factory=StudentModelArgs,
        description="The checkpoint that the student starts from, and which parameters are trained.",
    )
    training_args: TrainingArgs = Field(
        default_factory=TrainingArgs, description="Optimizer, schedule and batch sizes."
    )
    data_args: DataArgs = Field(default_factory=DataArgs, description="Training data.")
    infer_batch_size: int = Field(
        default=16, ge=1, description="Rows in one micro-batch of one rank during validation."
    )
    use_sequence_packing: bool = Field(
        default=False,
        description="Pack several rows into one sequence to avoid padding. Rows of a pack do not attend to each other.",
    )
    packing_algorithm: Packing = Field(
        default="best_fit_decreasing",
        description="Algorithm that assigns rows to packs by their number of tokens.",
    )
    use_dynamic_batching_in_train: bool = Field(
        default=False,
        description="Limit micro-batches by tokens (`max_tokens_per_microbatch_in_train`) instead of by rows.",
    )
    max_tokens_per_microbatch_in_train: int = Field(
        default=0,
        ge=0,
        description="Maximum number of tokens, including padding, in a dynamic micro-batch of one rank.",
    )
    sequence_length_round_in_train: int = Field(
        default=4,
        ge=1,
        description="Rows are padded to a multiple of this number of tokens; with packing, micro-batches are.",
    )
