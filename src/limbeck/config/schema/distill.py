"""The whole configuration of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from limbeck.config.schema.base import ContradictionError, Environment, Files, Section
from limbeck.config.schema.data import SourceArgs, ValidationConfig
from limbeck.config.schema.objective import FAULTS, OBJECTIVE_KWARGS, OBJECTIVES, FeaturesConfig, Objective, Tail
from limbeck.config.schema.rules import contradictions as contradictions_of
from limbeck.config.schema.training import CheckpointConfig
from limbeck.config.schema.workers import StudentConfig, TeacherConfig, WorkerConfig


def _run_plugins(files: list[str]) -> list[str]:
    from limbeck.errors import LimbeckError
    from limbeck.plugins import load_plugin

    for file in files:
        try:
            load_plugin(file)
        except LimbeckError as error:
            raise ValueError(str(error)) from error
    return files


class DistillConfig(Section):
    """One run. Only a student, a data file and (unless `distill_loss_weight` is 0) a teacher must be named."""

    exp_name: str = Field(default="distill", min_length=1, description="Name of the run in logs and reports.")
    seed: int = Field(default=42, ge=0, description="Decides everything random: data order, dropout, fresh weights.")
    output_dir: str = Field(default="./output", min_length=1, description="Folder of checkpoints, metrics and reports.")
    logging_dir: str | None = Field(default=None, description="Folder of the log files; unset, `<output_dir>/logs`.")

    student_pretrain: str | None = Field(
        default=None, description="The student's checkpoint: a folder or a Hugging Face id."
    )
    teacher_pretrain: str | None = Field(
        default=None, description="The teacher's checkpoint: a folder or a Hugging Face id."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Folder or Hugging Face id of the tokenizer; unset, the student's, else the teacher's.",
    )

    question_key: str = Field(default="question", description="Column of the data that holds the question.")
    answer_key: str = Field(default="answer", description="Column of the data that holds the answer to learn.")
    prompt_key: str | None = Field(
        default=None, description="Column whose text is put before the question, on a line of its own."
    )
    system_key: str | None = Field(default=None, description="Column that holds the system message.")
    sequence_length: int = Field(
        default=1024, ge=2, description="Tokens of question and answer together; longer rows are cut."
    )
    distill_on_prompt: bool = Field(
        default=False, description="Learn the question's tokens too, in both parts of the loss, not only the answer's."
    )

    distill_loss_weight: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the distillation term in the loss; the cross-entropy with the answer gets 1 minus this.",
    )
    plugins: Annotated[Files, AfterValidator(_run_plugins)] = Field(
        default_factory=list,
        description="Python files of yours that register divergences or trackers; they are run when the configuration is read.",
    )
    objective_preset: Literal["roll", "nemo_rl", "hyperpod", "modelopt", "trl"] | None = Field(
        default=None,
        description="Fill the keys of the objective that are not written with those of another system, for its numbers.",
    )
    objective_faults: list[Literal[FAULTS]] = Field(  # type: ignore[valid-type]
        default_factory=list,
        description="Quirks of other systems to reproduce, for users who must match their numbers: unshifted_mask, "
        "every_token, base_vocabulary, zero_padded_vocabulary, mean_over_vocabulary, mean_of_micro_batches.",
    )
    kd_objective: Objective = Field(
        default="forward_kl",
        description=f"Divergence between the teacher's and the student's next-token distributions: "
        f"{', '.join(OBJECTIVES)}, or one that a plugin registers.",
    )
    kd_objective_kwargs: dict[str, float | str] = Field(
        default_factory=dict,
        description="What else shapes the divergence: "
        + "".join(f"{name}: {', '.join(parameters)}; " for name, parameters in OBJECTIVE_KWARGS.items())
        + "for your own: its parameters.",
    )
    kd_temperature: float = Field(
        default=1.0, gt=0, description="Divides the student's logits in the distillation term."
    )
    teacher_temperature: float | None = Field(
        default=None, gt=0, description="Divides the teacher's logits; unset, `kd_temperature`."
    )
    temperature_convention: Literal["absolute", "roll"] = Field(
        default="absolute",
        description="absolute: teacher_temperature is all that divides the teacher's logits; roll: it is multiplied by "
        "kd_temperature, and is 1 when unset.",
    )
    temperature_squared: bool = Field(
        default=False,
        description="Multiply the distillation term by kd_temperature squared, so that its gradient keeps its size.",
    )
    logits_topk: int = Field(
        default=0,
        ge=0,
        description="0 compares whole vocabularies, exactly; k > 0 compares the teacher's k most likely tokens only, "
        "and what logits_topk_tail makes of the rest.",
    )
    logits_topk_tail: Tail = Field(
        default="renormalize",
        description="The tokens outside logits_topk: renormalize (both sides are renormalised to the k), bucket (one further "
        "token), drop (left out of the sum), uniform (the teacher's rest spread evenly), zero (none for the teacher).",
    )
    adaptive_kl_alpha: float = Field(
        default=0.5, ge=0, le=1, description="Teacher probability mass that counts as the tail in adaptive_kl."
    )
    skew_lambda: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the other distribution mixed in by the skewed objectives."
    )
    js_beta: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Weight of the teacher in js_divergence's mixture; 0.5 is the symmetric one, 0 and 1 stand for the "
        "forward and the reverse KL as in GKD.",
    )

    cross_tokenizer: Literal["off", "hybrid", "uld"] = Field(
        default="off",
        description="How a teacher with another tokenizer is compared, over spans of equal text: hybrid (kd_objective over the "
        "tokens that both have, sorted probabilities for the rest), uld (sorted probabilities only), or off (refused).",
    )
    cross_tokenizer_rest_weight: float = Field(
        default=1.0,
        ge=0,
        description="In hybrid, the weight of the sorted difference over tokens that one side alone has.",
    )
    cross_tokenizer_merge: Literal["span", "gold"] = Field(
        default="span",
        description="How a span of several tokens becomes one distribution: span (a proper one, with an entry for the span), "
        "gold (the first token's, scaled by the later tokens' probability, as in TRL's GOLD).",
    )
    cross_tokenizer_tokens: dict[str, str] = Field(
        default_factory=dict,
        description="Special tokens of the student and what the teacher reads instead, such as "
        '`{"<|im_end|>": "<end_of_turn>"}`; end tokens correspond without being named.',
    )

    compile_loss: Literal["auto"] | bool = Field(
        default="auto",
        description="Compile the elementwise part of the loss: auto does where there is a compiler and the run is long "
        "enough to repay some ten seconds.",
    )
    features: FeaturesConfig = Field(
        default_factory=FeaturesConfig,
        description="Which inner states of student and teacher are compared beside their logits.",
    )
    loss_balance: Literal["weighted", "modelopt"] = Field(
        default="weighted",
        description="weighted adds the parts of the loss with their fixed weights; modelopt scales, in each micro-batch, the "
        "features to the logits' divergence and both to the cross-entropy (left out with distill_loss_weight: 1).",
    )

    step_source: str = Field(default="dataset", description="Which implementation provides the steps.")
    step_source_kwargs: dict[str, Any] = Field(default_factory=dict, description="Settings of step_source.")
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many optimizer steps; with epochs given too, whichever ends first.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Scale gradients down to this global norm when they exceed it; 0 switches it off.",
    )
    save_steps: int = Field(
        default=50,
        ge=0,
        description="Save a checkpoint every so many optimizer steps and at the end; 0: only at the end.",
    )
    max_ckpt_to_keep: int = Field(
        default=0, ge=0, description="Keep only this many of the newest checkpoints (and the best one); 0 keeps all."
    )
    resume_from_checkpoint: bool | str = Field(
        default=False,
        description="true or latest continues from the newest checkpoint of the run's checkpoint folder; a path from that one.",
    )
    checkpoint_config: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="Where checkpoints go and which of them counts as the best."
    )
    logging_steps: int = Field(default=1, ge=1, description="Record training metrics every so many optimizer steps.")
    eval_steps: int = Field(
        default=10, ge=0, description="Measure on the validation files every so many optimizer steps; 0: never."
    )
    track_with: str = Field(
        default="tensorboard",
        description="Where metrics go beside `<output_dir>/metrics.jsonl`: tensorboard, stdout, none, or a tracker "
        "that you have registered.",
    )
    tracker_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="For tensorboard: `log_dir`, the folder of its event files (unset, logging_dir).",
    )

    system_envs: Environment = Field(
        default_factory=dict, description="Environment variables set before anything is loaded."
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="How often a run of worker groups goes on from its last checkpoint by itself after a worker died or "
        "hung.",
    )
    num_nodes: int = Field(default=1, ge=1, description="Machines that take part.")
    num_gpus_per_node: int | None = Field(
        default=None,
        ge=1,
        description="Devices that each machine has: device numbers must lie below num_nodes x this; unset, unchecked.",
    )

    logits_transfer_backend: Literal["auto", "ray", "gloo", "ipc+nccl", "nccl-only"] = Field(
        default="auto",
        description="How a teacher in other processes sends its answers: ray (the object store, which auto means too), gloo "
        "(from CPU to CPU), nccl-only (from GPU to GPU) or ipc+nccl (the same, and by CUDA IPC between workers on one GPU).",
    )

    is_offload_states: bool = Field(
        default=False,
        description="Student and teacher on the same devices are processes of their own and take turns: while one works, the "
        "other's parameters and optimizer are in the machine's memory.",
    )
    offload_interval: int = Field(
        default=8,
        ge=1,
        description="With is_offload_states, optimizer steps that the teacher answers for in one turn; the answers wait in "
        "the machine's memory.",
    )

    student: StudentConfig = Field(default_factory=StudentConfig, description="The model that is trained.")
    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="The model that answers.")
    validation: ValidationConfig | None = Field(
        default=None, description="What the student is measured on while it trains; unset, nothing."
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> DistillConfig:
        for role, pretrain in (("student", self.student_pretrain), ("teacher", self.teacher_pretrain)):
            worker: WorkerConfig = getattr(self, role)
            if pretrain is not None and worker.model_args.model_name_or_path is None:
                model_args = worker.model_args.model_copy(update={"model_name_or_path": pretrain})
                # Frozen for everybody else; here the object is still being made.
                object.__setattr__(self, role, worker.model_copy(update={"model_args": model_args}))
        contradictions = list(contradictions_of(self))
        if contradictions:
            raise ContradictionError(contradictions)
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is named."""
        return self.teacher.model_args.names_a_model

    @property
    def teacher_signal(self) -> str:
        """What a teacher in other processes sends: ``teacher.signal``, or what auto means here."""
        if self.teacher.signal != "auto":
            return self.teacher.signal
        return "top_k" if self.logits_topk and not self.objective_faults else "hidden_states"

    @property
    def effective_teacher_temperature(self) -> float:
        """What the teacher's logits are divided by."""
        if self.temperature_convention == "roll":
            return self.kd_temperature * (1.0 if self.teacher_temperature is None else self.teacher_temperature)
        return self.kd_temperature if self.teacher_temperature is None else self.teacher_temperature

    @property
    def tokenizer_name_or_path(self) -> str | None:
        """Where the tokenizer comes from: its own key, else the student, else the teacher."""
        student, teacher = self.student.model_args, self.teacher.model_args
        return self.tokenizer or student.model_name_or_path or teacher.model_name_or_path

    @property
    def num_train_epochs(self) -> float | None:
        """Passes over the data after which the run ends; None when `max_steps` alone decides."""
        epochs = self.student.training_args.num_train_epochs
        return 1.0 if epochs is None and self.max_steps is None else epochs

    @property
    def data_seed(self) -> int:
        """The seed of the order of the data."""
        data_seed = self.student.training_args.data_seed
        return self.seed if data_seed is None else data_seed

    @property
    def max_tokens_per_microbatch(self) -> int:
        """Tokens that one micro-batch may hold; 0 when micro-batches are cut by rows."""
        return self.student.max_tokens_per_microbatch_in_train if self.student.use_dynamic_batching_in_train else 0

    @property
    def validation_files(self) -> list[str]:
        """The files that the student is measured on; empty when there are none."""
        named = self.validation.data_args.file_name if self.validation else None
        return list(named or self.student.data_args.eval_file_name or [])

    @property
    def data_sources(self) -> list[SourceArgs]:
        """What is learned from: the entries of `sources`, or one entry for each name of `file_name`."""
        args = self.student.data_args
        entries = [SourceArgs.model_validate(entry) for entry in args.sources or ()]
        for name in args.file_name or ():
            is_hub = name.startswith("hub:")
            entries.append(SourceArgs(hub=name[4:]) if is_hub else SourceArgs(path=[name]))
        return entries

    @property
    def checkpoint_dir(self) -> Path:
        """The folder that holds the checkpoint-<N> folders."""
        return Path(self.checkpoint_config.output_dir or self.output_dir)

    @property
    def log_dir(self) -> Path:
        """The folder of the log files."""
        return Path(self.logging_dir) if self.logging_dir else Path(self.output_dir) / "logs"

    @property
    def device_mapping(self) -> list[int] | None:
        """The devices of the student, one rank each; None when the launcher decides. Named for one role, they are
        both's, unless the teacher is a service.
        """
        shared = None if self.teacher.service is not None else self.teacher.device_mapping
        return self.student.device_mapping or shared

    @property
    def needs_worker_groups(self) -> bool:
        """Whether the teacher is a service, has devices of its own, or takes turns on the student's, so that each role
        is processes that Ray places.
        """
        ours, theirs = self.student.device_mapping, self.teacher.device_mapping
        apart = ours is not None and theirs is not None and (ours != theirs or self.offloads_colocated)
        return self.has_teacher and (apart or self.teacher.service is not None)

    @property
    def offloads_colocated(self) -> bool:
        """Whether student and teacher are never together on the devices that they share."""
        shared = set(self.student.device_mapping or ()) & set(self.teacher.device_mapping or ())
        names = (self.student.strategy_args.strategy_name, self.teacher.strategy_args.strategy_name)
        can = shared and self.has_teacher and self.teacher.service is None
        return bool(self.is_offload_states and can and not any((name or "").startswith("deepspeed") for name in names))

    @property
    def transfers_directly(self) -> bool:
        """Whether answers go from worker to worker, past Ray's object store."""
        asked = self.logits_transfer_backend not in ("auto", "ray")
        return asked and self.needs_worker_groups and not self.offloads_colocated

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of the run and of both roles, if these share one process."""
        shared = {} if self.needs_worker_groups else {**self.student.system_envs, **self.teacher.system_envs}
        return {**self.system_envs, **shared}
