"""How long, how fast and in what portions the student is trained, and what is kept of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from limbeck.config.schema.base import Section

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
"""Per scheduler, the lr_scheduler_kwargs that it reads; a scheduler that is not listed reads none."""


REQUIRED_SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Per scheduler, the lr_scheduler_kwargs of which one must be given."""


TRACKER_KWARGS: dict[str, tuple[str, ...]] = {"tensorboard": ("log_dir",), "stdout": (), "none": ()}
"""Per tracker of the package, the tracker_kwargs that it reads."""


class TrainingArgs(Section):
    """How long, how fast, and in what portions the student is trained."""

    num_train_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Passes over the data, fractions allowed; unset, `max_steps` decides, or one pass if that is "
        "unset too.",
    )
    learning_rate: float = Field(default=5e-5, ge=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Scheduler = Field(
        default="linear", description="Shape of the learning rate over the run, by its name in transformers."
    )
    lr_scheduler_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Values that the scheduler's shape needs, such as `min_lr` or `num_decay_steps`.",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="Optimizer steps over which the rate rises from 0; above 0 it wins over warmup_ratio.",
    )
    warmup_ratio: float = Field(default=0.0, ge=0, le=1, description="Warm-up as a share of all optimizer steps.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the gradient's running mean.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the squared gradient's mean.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW's guard against division by zero.")
    per_device_train_batch_size: int = Field(
        default=8,
        ge=1,
        description="Rows in one micro-batch of one rank. With packing: rows of `sequence_length` tokens.",
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Micro-batches of each rank that are summed into one optimizer step."
    )
    group_by_length: bool = Field(
        default=False,
        description="Without packing: a step takes rows of similar length, which need less padding; the steps themselves come "
        "in any order.",
    )
    data_seed: int | None = Field(default=None, ge=0, description="Seed of the order of the data; unset, `seed`.")


class CheckpointConfig(Section):
    """Where checkpoints go and which of them counts as the best."""

    output_dir: str | None = Field(
        default=None,
        description="Folder of the checkpoints, written straight into it; unset, the top-level `output_dir`.",
    )
    best_metric: str | None = Field(
        default="val/loss",
        description="Metric that chooses the best checkpoint, such as val/loss; `null` chooses none.",
    )
    best_mode: Literal["min", "max"] = Field(
        default="min", description="Whether the smallest or the largest value of best_metric is the best."
    )
