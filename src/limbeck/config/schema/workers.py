"""The two roles: the student, which is trained, and the teacher, which answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from limbeck.config.device_mapping import parse_device_mapping
from limbeck.config.schema.base import Environment, Section
from limbeck.config.schema.data import DataArgs
from limbeck.config.schema.models import ModelArgs, StrategyArgs, StudentModelArgs
from limbeck.config.schema.training import TrainingArgs

SERVICE_NAME = r"^[A-Za-z0-9._-]+$"
"""What a teacher service can be called."""


Packing = Literal["best_fit_decreasing", "modified_first_fit_decreasing"]


Devices = Annotated[list[int] | None, BeforeValidator(parse_device_mapping)]


class WorkerConfig(Section):
    """What student and teacher have in common."""

    model_args: ModelArgs = Field(default_factory=ModelArgs, description="Which checkpoint, and how it is loaded.")
    strategy_args: StrategyArgs = Field(default_factory=StrategyArgs, description="How it is spread over the ranks.")
    device_mapping: Devices = Field(
        default=None,
        description="Device numbers, one rank each: [0, 1], list(range(0, 8)), range(8) or 0,1,2. Named for one role they "
        "are shared by both; where student and teacher differ, Ray places a group of workers for each. Without GPUs they "
        "count CPU slots. Unset, the launcher decides.",
    )
    system_envs: Environment = Field(
        default_factory=dict,
        description="Environment variables for this role's processes, which are the other role's too unless the two have "
        "different devices.",
    )
    backend_timeout: float = Field(
        default=30,
        gt=0,
        description="Minutes that a rank of a worker group waits for another, or for the teacher's answer, before it counts "
        "as hung.",
    )


class TeacherConfig(WorkerConfig):
    """The model that answers. It reads the student's batches, so it has no data and no batch sizes of its own."""

    service: str | None = Field(
        default=None,
        pattern=SERVICE_NAME,
        description="Ask the teacher that `limbeck serve-teacher` keeps under this name on the Ray of RAY_ADDRESS, instead of "
        "loading one; teacher.device_mapping is then the service's alone.",
    )
    source: str = Field(default="auto", description="Which implementation provides the teacher.")
    source_kwargs: dict[str, Any] = Field(default_factory=dict, description="Settings of teacher.source.")
    signal: Literal["auto", "hidden_states", "top_k", "logits"] = Field(
        default="auto",
        description="What a teacher in other processes sends of each supervised position: hidden_states (with the output "
        "head, sent once, the whole distribution), top_k (the logits_topk most likely tokens) or logits (all of them); auto: "
        "top_k with logits_topk, else hidden_states.",
    )


class StudentConfig(WorkerConfig):
    """The model that is trained."""

    model_args: StudentModelArgs = Field(
        default_factory=StudentModelArgs,
        description="Which checkpoint it starts from, and which parameters are trained.",
    )
    training_args: TrainingArgs = Field(
        default_factory=TrainingArgs, description="How long, how fast, and in what portions."
    )
    data_args: DataArgs = Field(default_factory=DataArgs, description="Which files it learns from.")
    infer_batch_size: int = Field(
        default=16, ge=1, description="Rows in one micro-batch of one rank during validation."
    )
    use_sequence_packing: bool = Field(
        default=False,
        description="Put several short rows into one, without letting them see each other, to avoid padding.",
    )
    packing_algorithm: Packing = Field(
        default="best_fit_decreasing",
        description="Which rows share a pack: best_fit_decreasing or modified_first_fit_decreasing; both by tokens.",
    )
    use_dynamic_batching_in_train: bool = Field(
        default=False,
        description="Cut micro-batches by tokens (`max_tokens_per_microbatch_in_train`) instead of by rows.",
    )
    max_tokens_per_microbatch_in_train: int = Field(
        default=0, ge=0, description="Tokens, padding included, that a dynamic micro-batch may hold on one rank."
    )
    sequence_length_round_in_train: int = Field(
        default=4,
        ge=1,
        description="Rows are padded to a multiple of this many tokens; with packing, the whole micro-batch is.",
    )
