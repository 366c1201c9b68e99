"""The student's optimizer, schedule and batch sizes, and its checkpoints."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

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
    "sequential",
    "megatron",
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
    "sequential": ("schedulers", "milestones", "interval"),
    "megatron": ("decay_style", "decay_steps", "min_lr", "warmup_init", "wsd_decay_style", "wsd_decay_steps"),
}
"""The lr_scheduler_kwargs that each scheduler reads; a scheduler that is not listed reads none."""


REQUIRED_SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
    "sequential": ("schedulers",),
}
"""Schedulers that need at least one of these lr_scheduler_kwargs."""


MEGATRON_STYLES: dict[str, tuple[str, ...]] = {
    "decay_style": ("linear", "cosine", "inverse-square-root", "constant", "WSD"),
    "wsd_decay_style": ("exponential", "linear", "cosine", "minus_sqrt"),
}
"""The styles of the scheduler ``megatron``; the first is the default."""


SEQUENTIAL_KWARGS: dict[str, dict[str, float]] = {
    "ConstantLR": {"factor": 1 / 3, "total_iters": 5},
    "CosineAnnealingLR": {"T_max": 0, "eta_min": 0.0},
    "ExponentialLR": {"gamma": 0.0},
    "LinearLR": {"start_factor": 1 / 3, "end_factor": 1.0, "total_iters": 5},
    "PolynomialLR": {"total_iters": 5, "power": 1.0},
    "StepLR": {"step_size": 0, "gamma": 0.1},
}
"""The schedules of torch.optim.lr_scheduler that ``sequential`` can use: their arguments and PyTorch's defaults. An argument
without a default there is 0 here."""

SEQUENTIAL_REQUIRED: dict[str, str] = {"CosineAnnealingLR": "T_max", "ExponentialLR": "gamma", "StepLR": "step_size"}
"""The argument of each that has no default."""


TRACKER_KWARGS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("log_dir",),
    "wandb": ("project", "entity", "name", "group", "tags", "notes", "mode", "log_dir", "settings"),
    "mlflow": ("tracking_uri", "experiment_name", "artifact_location", "run_name", "run_id"),
    "swanlab": (
        *("project", "workspace", "name", "experiment_name", "description", "group", "tags", "mode"),
        *("log_dir", "logdir"),
    ),
    "stdout": (),
    "none": (),
}
"""The tracker_kwargs that each built-in tracker reads."""


STEP_SOURCE_KWARGS: dict[str, tuple[str, ...]] = {"dataset": (), "rollout": ()}
"""The step_source_kwargs that each built-in step source reads."""


class TrainingArgs(Section):
    """The student's optimizer, schedule and batch sizes."""

    num_train_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Number of epochs; fractions are allowed. If unset, `max_steps` decides, or one epoch if that is "
        "unset too.",
    )
    optimizer_name: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = Field(
        default="adamw",
        description="The optimizer: adamw; adamw_8bit (torchao's, with moments in 8 bits; needs limbeck[torchao]); adafactor "
        "(transformers', with factored second moments and this learning rate as it is); or muon (torch.optim.Muon of PyTorch "
        "2.9 or later for the matrices of the layers, AdamW for embeddings, output head, biases and norms).",
    )
    learning_rate: float = Field(default=5e-5, ge=0, description="Peak learning rate.")
    lr_scheduler_type: Scheduler = Field(
        default="linear",
        description="Learning rate schedule, by its name in transformers. sequential is a sequence of schedules of "
        "torch.optim.lr_scheduler, as PyTorch's SequentialLR; megatron is Megatron-LM's.",
    )
    lr_scheduler_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the schedule, such as `min_lr` or `num_decay_steps`. sequential has `schedulers`, a list of "
        "`{name: LinearLR, start_factor: 0.1, total_iters: 10}`, `milestones`, the steps at which the others begin, and "
        "`interval`, the number of optimizer steps that count as one (1). megatron has `decay_style` (linear, cosine, "
        "inverse-square-root, constant or WSD), `decay_steps` (all), after which the rate is `min_lr` (0), `warmup_init` (0), "
        "and for WSD `wsd_decay_steps` and `wsd_decay_style` (exponential, linear, cosine or minus_sqrt).",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="Number of optimizer steps over which the learning rate rises from 0. Above 0, it takes precedence "
        "over warmup_ratio.",
    )
    warmup_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Warm-up steps as a fraction of all optimizer steps."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of matrices.")
    adam_beta1: float = Field(
        default=0.9, ge=0, lt=1, description="Decay rate of AdamW's running mean of the gradient."
    )
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Decay rate of AdamW's running mean of the squared gradient."
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Term added to AdamW's denominator.")
    per_device_train_batch_size: int = Field(
        default=8,
        ge=1,
        description="Rows in one micro-batch of one rank. With packing, packs of `sequence_length` tokens.",
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Number of micro-batches of each rank per optimizer step."
    )
    group_by_length: bool = Field(
        default=False,
        description="Put rows of similar length into the same step to reduce padding. It has no effect with packing.",
    )
    data_seed: int | None = Field(default=None, ge=0, description="Seed of the order of the data. If unset, `seed`.")


class HubConfig(Section):
    """The repository on the Hugging Face hub that the student is uploaded to at the end of the run."""

    repo_id: str | None = Field(
        default=None,
        description="OWNER/NAME of the repository; it is made if it does not exist. If unset, nothing is uploaded. The token "
        "is read from HF_TOKEN or from the file that `hf auth login` writes.",
    )
    private: bool = Field(default=True, description="Whether a new repository is private.")
    branch: str | None = Field(
        default=None,
        description="Branch that is uploaded to; it is made if it does not exist. If unset, the main branch.",
    )

    @field_validator("repo_id")
    @classmethod
    def _owner_and_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            raise ValueError("is not the name of a repository; write OWNER/NAME")
        return value


class CheckpointConfig(Section):
    """Checkpoint folder, the choice of the best checkpoint, and the upload of the student."""

    output_dir: str | None = Field(
        default=None,
        description="Folder of the checkpoints. If unset, the top-level `output_dir`.",
    )
    best_metric: str | None = Field(
        default="val/loss",
        description="Metric that selects the best checkpoints: any metric of the run, such as val/loss, val/accuracy or "
        "train/loss; `null` selects none.",
    )
    best_mode: Literal["min", "max"] = Field(
        default="min", description="Whether the smallest or the largest value of best_metric is the best."
    )
    async_save: bool = Field(
        default=True,
        description="Whether training goes on while a checkpoint is written. It waits for the copy to host memory only, and "
        "the next save waits for the previous one. false: training waits until the checkpoint is complete.",
    )
    save_before: str | None = Field(
        default=None,
        description="Time limit of the job, HH:MM since the run has started. The run saves and stops in time, judged by its "
        "longest step and save so far, with the exit status 0. Leave out of it what the job does before it starts the run.",
    )
    keep_best: int = Field(
        default=1,
        ge=1,
        description="Number of best checkpoints that max_ckpt_to_keep never removes.",
    )
    save_megatron: bool = Field(
        default=False,
        description="When the run ends with a checkpoint, also at a time limit, a signal or a limit of rollout.stop_if, "
        "write the student as a checkpoint of Megatron-LM, to the folder `megatron` beside the checkpoints. `limbeck convert` "
        "makes one from any checkpoint.",
    )
    megatron_format: Literal["torch_dist", "torch"] = Field(
        default="torch_dist",
        description="Format of that checkpoint. Megatron-LM loads `torch_dist` in any layout, and `torch`, its legacy format, "
        "without tensor, pipeline and expert parallelism and with Transformer Engine's layers.",
    )
    save_to_hub: HubConfig = Field(
        default_factory=HubConfig, description="Upload of the student to the Hugging Face hub at the end of the run."
    )

    @field_validator("save_before", mode="before")
    @classmethod
    def _hours_and_minutes(cls, value: Any) -> Any:
        """YAML reads 12:30 without quotes as the number 750."""
        if value is not None and not re.fullmatch(r"(?!0+:00)\d{1,3}:[0-5]\d", str(value)):
            raise ValueError('is not a time limit above 0; write hours and minutes in quotes, such as "03:30"')
        return value
