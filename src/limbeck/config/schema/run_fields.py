"""The keys of one run at the top level of a configuration. Combinations are checked in ``distill.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from limbeck.config.plugins import load_plugin
from limbeck.config.schema.base import Environment, Files, Section, registered
from limbeck.config.schema.data import SourceArgs, ValidationConfig, source_parts
from limbeck.config.schema.objective import (
    FAULTS,
    OBJECTIVE_KWARGS,
    OBJECTIVES,
    SAMPLED_OBJECTIVES,
    FeaturesConfig,
    Objective,
    Tail,
)
from limbeck.config.schema.rollout import RolloutConfig
from limbeck.config.schema.training import CheckpointConfig
from limbeck.config.schema.workers import StudentConfig, TeacherConfig
from limbeck.errors import LimbeckError
from limbeck.registry import NEEDS_NO_MODEL, STEP_SOURCES, TEACHERS, TRACKERS


def _run_plugins(files: list[str]) -> list[str]:
    for file in files:
        try:
            load_plugin(file)
        except LimbeckError as error:
            raise ValueError(str(error)) from error
    return files


class RunFields(Section):
    """The keys of a run at the top level of a configuration, and what follows from them."""

    exp_name: str = Field(default="distill", min_length=1, description="Name of the run in logs and reports.")
    seed: int = Field(
        default=42, ge=0, description="Seed of everything random: order of the data, dropout, new weights."
    )
    output_dir: str = Field(default="./output", min_length=1, description="Folder of checkpoints, metrics and reports.")
    logging_dir: str | None = Field(default=None, description="Folder of the log files. If unset, `<output_dir>/logs`.")

    student_pretrain: str | None = Field(
        default=None, description="Folder or Hugging Face id of the student's checkpoint."
    )
    teacher_pretrain: str | None = Field(
        default=None,
        description="Folder or Hugging Face id of the teacher's checkpoint. A teacher.source without a model needs none.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="Folder or Hugging Face id of the tokenizer, or null:N for token ids below N without text, or "
        "gpt2:VOCAB,MERGES for the files of a byte-level tokenizer of GPT-2. If unset, the student's, else the teacher's.",
    )

    question_key: str = Field(default="question", description="Column of the question.")
    answer_key: str = Field(default="answer", description="Column of the answer that the student is trained on.")
    prompt_key: str | None = Field(
        default=None, description="Column whose text is prepended to the question as a separate line."
    )
    system_key: str | None = Field(default=None, description="Column of the system message.")
    sequence_length: int = Field(
        default=1024,
        ge=2,
        description="Maximum number of tokens of a row, question and answer together. `student.data_args.overlong` "
        "decides what happens to longer rows.",
    )
    distill_on_prompt: bool = Field(
        default=False,
        description="Supervise the tokens of the question as well as those of the answer, in both terms of the loss.",
    )

    distill_loss_weight: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Weight of the distillation term in the loss. The cross-entropy with the answer has the weight 1 "
        "minus this. For answers that the student has written itself (rollout) the weight is always 1, so cross-entropy "
        "applies to the answers of the data and of the teacher only.",
    )
    plugins: Annotated[Files, AfterValidator(_run_plugins)] = Field(
        default_factory=list,
        description="Python files that register your divergences, strategies, teacher sources, step sources, "
        "generators, "
        "trackers or dialects. They are run before the configuration is checked.",
    )
    objective_preset: Literal["roll", "nemo_rl", "hyperpod", "modelopt", "trl"] | None = Field(
        default=None,
        description="Set the objective's keys that the configuration does not set to those of another system, to "
        "reproduce its loss.",
    )
    objective_faults: list[Literal[FAULTS]] = Field(  # type: ignore[valid-type]
        default_factory=list,
        description="Quirks of other systems to reproduce, in order to match their results: unshifted_mask, "
        "every_token, base_vocabulary, zero_padded_vocabulary, mean_over_vocabulary, mean_of_micro_batches, "
        "trained_padding.",
    )
    kd_objective: Objective = Field(
        default="forward_kl",
        description=f"Divergence between the teacher's and the student's next-token distributions: "
        f"{', '.join(OBJECTIVES)}, or one that a plug-in registers; or an objective on the token that the student has "
        f"sampled, with rollout: {', '.join(SAMPLED_OBJECTIVES)}.",
    )
    kd_objective_kwargs: dict[str, float | str] = Field(
        default_factory=dict,
        description="Parameters of the divergence: "
        + "".join(f"{name}: {', '.join(parameters)}; " for name, parameters in OBJECTIVE_KWARGS.items())
        + "for one from a plug-in: its own parameters.",
    )
    kd_temperature: float = Field(
        default=1.0, gt=0, description="Divides the student's logits in the distillation term."
    )
    teacher_temperature: float | None = Field(
        default=None, gt=0, description="Divides the teacher's logits. If unset, `kd_temperature`."
    )
    temperature_convention: Literal["absolute", "roll"] = Field(
        default="absolute",
        description="absolute: the teacher's logits are divided by teacher_temperature. roll: they are divided by "
        "kd_temperature x teacher_temperature, which is 1 if unset.",
    )
    temperature_squared: bool = Field(
        default=False,
        description="Multiply the distillation term by kd_temperature squared, which keeps the scale of its gradient.",
    )
    logits_topk: int = Field(
        default=0,
        ge=0,
        description="Number of the teacher's most likely tokens that are compared; logits_topk_tail decides how the "
        "others "
        "count. 0 compares the whole vocabulary.",
    )
    logits_topk_tail: Tail = Field(
        default="renormalize",
        description="Tokens outside logits_topk: renormalize (both distributions are renormalised over the k tokens), "
        "bucket "
        "(they count as one further token), drop (they are left out of the sum), uniform (the teacher's remaining "
        "probability is spread evenly), zero (the teacher's remaining probability is 0).",
    )
    topk_from: Literal["teacher", "student"] = Field(
        default="teacher",
        description="Whose logits_topk most likely tokens are compared. student needs a teacher.signal of hidden_states or "
        "logits.",
    )
    adaptive_kl_alpha: float = Field(
        default=0.5, ge=0, le=1, description="Probability mass of the teacher that adaptive_kl treats as the tail."
    )
    skew_lambda: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the other distribution in the mixture of skewed_forward_kl and skewed_reverse_kl.",
    )
    js_beta: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Weight of the teacher in the mixture of js_divergence. 0.5 is symmetric; 0 and 1 are the forward "
        "and "
        "the reverse KL, as in GKD.",
    )

    cross_tokenizer: Literal["off", "hybrid", "uld"] = Field(
        default="off",
        description="Comparison with a teacher that has another tokenizer, over spans of equal text: hybrid "
        "(kd_objective over "
        "the tokens of both vocabularies, sorted probabilities for the others), uld (sorted probabilities only) or off (the "
        "tokenizers must match).",
    )
    cross_tokenizer_rest_weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the difference of sorted probabilities, over the tokens of one vocabulary only, in "
        "hybrid.",
    )
    cross_tokenizer_merge: Literal["span", "gold"] = Field(
        default="span",
        description="Distribution of a span of several tokens: span (normalised, with an entry for the span) or gold "
        "(the "
        "first token's, scaled by the probability of the later tokens, as in TRL's GOLD).",
    )
    cross_tokenizer_tokens: dict[str, str] = Field(
        default_factory=dict,
        description="Special tokens of the student and the corresponding ones of the teacher, such as "
        '`{"<|im_end|>": "<end_of_turn>"}`. End tokens correspond by default.',
    )

    compile_loss: Literal["auto"] | bool = Field(
        default="auto",
        description="Compile the elementwise part of the loss with torch.compile. auto compiles if a compiler is "
        "installed and "
        "the run is long enough to make up for about ten seconds of compilation.",
    )
    compile_model: Literal["auto"] | bool = Field(
        default="auto",
        description="Compile the layers of student and teacher with torch.compile. auto compiles a model if a compiler is "
        "installed and the run is long enough to make up for the compilation, which takes ten seconds to a minute.",
    )
    features: FeaturesConfig = Field(
        default_factory=FeaturesConfig,
        description="Intermediate features of student and teacher that enter the loss.",
    )
    loss_balance: Literal["weighted", "modelopt"] = Field(
        default="weighted",
        description="weighted adds the terms of the loss with fixed weights. modelopt scales, in each micro-batch, the "
        "feature "
        "loss to the divergence and both to the cross-entropy; distill_loss_weight: 1 leaves the cross-entropy out.",
    )

    rollout: RolloutConfig | None = Field(
        default=None,
        description="On-policy distillation: the student writes a share of the samples. If unset, all samples are rows of the "
        "data.",
    )
    step_source: Annotated[str, registered(STEP_SOURCES)] | None = Field(
        default=None,
        description="Where the batches of a training step come from: dataset (the training data), rollout (also what the "
        "student writes), or a source that a plug-in registers. If unset, rollout with the section of that name, else dataset.",
    )
    step_source_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of a step source that a plug-in registers."
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of optimizer steps. With num_train_epochs too, the run ends at whichever comes "
        "first.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Maximum global norm of the gradient; larger gradients are scaled down. 0 disables clipping.",
    )
    save_steps: int = Field(
        default=50,
        ge=0,
        description="Number of optimizer steps between checkpoints. The last step is always saved; 0 saves only that.",
    )
    save_minutes: float | None = Field(
        default=None,
        gt=0,
        description="Number of minutes between checkpoints, in addition to save_steps: a checkpoint is written when the last "
        "one is that old.",
    )
    max_ckpt_to_keep: int = Field(
        default=0,
        ge=0,
        description="Maximum number of checkpoints. The oldest are removed, but never the newest one and the best ones "
        "(checkpoint_config.keep_best). 0 keeps all.",
    )
    resume_from_checkpoint: bool | str = Field(
        default=False,
        description="true or latest resumes from the newest checkpoint of the run; a path resumes from that "
        "checkpoint.",
    )
    checkpoint_config: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="Checkpoint folder, and the choice of the best checkpoint."
    )
    logging_steps: int = Field(
        default=1, ge=1, description="Number of optimizer steps between records of the training metrics."
    )
    eval_steps: int = Field(
        default=10, ge=0, description="Number of optimizer steps between validations. 0 disables validation."
    )
    track_with: Annotated[str | list[str], registered(TRACKERS)] = Field(
        default="tensorboard",
        description="Tracker of the metrics, or a list of several, in addition to `<output_dir>/metrics.jsonl`: "
        "tensorboard, wandb (Weights & Biases), mlflow, swanlab, stdout, none, or one that a plug-in registers.",
    )
    tracker_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the tracker; if track_with is a list, a section of arguments for each tracker, by its "
        "name. tensorboard reads `log_dir`, the folder of its event files (by default logging_dir); wandb reads "
        "`project`, `entity`, `name`, `group`, `tags`, `notes`, `mode`, `log_dir` and `settings`; mlflow reads "
        "`tracking_uri`, `experiment_name`, `artifact_location`, `run_name` and `run_id`; swanlab reads `project`, "
        "`workspace`, `name`, `description`, `group`, `tags`, `mode` and `log_dir`. Keys and tokens are read from the "
        "environment.",
    )

    system_envs: Environment = Field(
        default_factory=dict, description="Environment variables, set before models are loaded."
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="Number of times that a run with worker groups restarts from its last checkpoint after a worker "
        "failed or "
        "stopped responding.",
    )
    num_nodes: int = Field(default=1, ge=1, description="Number of machines.")
    num_gpus_per_node: int | None = Field(
        default=None,
        ge=1,
        description="Number of devices of each machine. Device numbers must be below num_nodes x num_gpus_per_node. If "
        "unset, they are not checked.",
    )

    logits_transfer_backend: Literal["auto", "ray", "gloo", "ipc+nccl", "nccl-only"] = Field(
        default="auto",
        description="Transport of the signals of a teacher in other processes: ray (Ray's object store, also used by "
        "auto), "
        "gloo (CPU to CPU), nccl-only (GPU to GPU) or ipc+nccl (CUDA IPC between workers on one GPU, NCCL otherwise).",
    )

    is_offload_states: bool = Field(
        default=False,
        description="Run a student and a teacher that share devices in separate processes, and keep the parameters and "
        "optimizer "
        "of the inactive one in host memory.",
    )
    offload_interval: int = Field(
        default=8,
        ge=1,
        description="With is_offload_states, number of optimizer steps for which the teacher computes signals before "
        "it is "
        "offloaded. The signals are kept in host memory.",
    )

    student: StudentConfig = Field(default_factory=StudentConfig, description="The model that is trained.")
    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="The teacher.")
    validation: ValidationConfig | None = Field(
        default=None, description="Validation of the student during training. If unset, there is none."
    )

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher: a model, or a teacher source that needs none."""
        return self.teacher.model_args.names_a_model or TEACHERS.has_trait(self.teacher.source, NEEDS_NO_MODEL)

    @property
    def needs_answers(self) -> bool:
        """Whether every training row must have an answer: not if the student or the teacher writes all of them."""
        if self.rollout is None or self.effective_step_source != "rollout":
            return True
        return "dataset" in self.rollout.origins

    @property
    def writes_answers(self) -> bool:
        """Whether prompts of the rows are continued: by the student or the teacher in training, or in validation."""
        if self.rollout is None or self.effective_step_source != "rollout":
            return False
        return bool({"student", "teacher"} & set(self.rollout.origins)) or self.effective_validation.rollout is not None

    @property
    def effective_step_source(self) -> str:
        """``step_source``, or what follows from ``rollout``."""
        return self.step_source or ("dataset" if self.rollout is None else "rollout")

    @property
    def has_policy_gradient(self) -> bool:
        """Whether the loss has the term of ``limbeck.objectives.policy_gradient``."""
        rewarded = self.rollout is not None and self.rollout.reward_weight > 0
        return rewarded or self.kd_objective == "policy_gradient"

    @property
    def teacher_signal(self) -> str:
        """``teacher.signal`` with auto resolved."""
        if self.teacher.signal != "auto":
            return self.teacher.signal
        if self.kd_objective in SAMPLED_OBJECTIVES:
            return "sampled_token"
        selects = self.logits_topk and self.topk_from == "teacher"
        return "top_k" if selects and not self.objective_faults else "hidden_states"

    @property
    def teacher_source(self) -> str:
        """``teacher.source`` with auto resolved."""
        return self.teacher.source if self.teacher.source != "auto" else self.default_teacher_source

    @property
    def default_teacher_source(self) -> str:
        """The teacher source that the devices of the roles require: Ray workers or a model in the student's processes."""
        return "ray" if self.needs_worker_groups else "model"

    @property
    def effective_teacher_temperature(self) -> float:
        """The divisor of the teacher's logits."""
        if self.temperature_convention == "roll":
            return self.kd_temperature * (1.0 if self.teacher_temperature is None else self.teacher_temperature)
        return self.kd_temperature if self.teacher_temperature is None else self.teacher_temperature

    @property
    def tokenizer_name_or_path(self) -> str | None:
        """The tokenizer's folder or id: its own key, else the student, else the teacher."""
        student, teacher = self.student.model_args, self.teacher.model_args
        named = self.tokenizer or student.megatron_arguments.get("tokenizer_model")
        return named or student.model_name_or_path or teacher.model_name_or_path

    @property
    def num_train_epochs(self) -> float | None:
        """Number of epochs; None if only `max_steps` limits the run."""
        epochs = self.student.training_args.num_train_epochs
        return 1.0 if epochs is None and self.max_steps is None else epochs

    @property
    def data_seed(self) -> int:
        """The seed of the order of the data."""
        data_seed = self.student.training_args.data_seed
        return self.seed if data_seed is None else data_seed

    @property
    def max_tokens_per_microbatch(self) -> int:
        """Maximum number of tokens in a micro-batch; 0 if micro-batches are limited by rows."""
        return self.student.max_tokens_per_microbatch_in_train if self.student.use_dynamic_batching_in_train else 0

    @property
    def validation_sources(self) -> list[SourceArgs]:
        """The validation data; empty if there is none."""
        given = self.validation.data_args if self.validation else None
        files = (given.file_name if given else None) or self.student.data_args.eval_file_name
        return source_parts((given.sources if given else None) or (), files or ())

    @property
    def effective_validation(self) -> ValidationConfig:
        """``validation``, or its defaults."""
        return self.validation or ValidationConfig()

    @property
    def data_sources(self) -> list[SourceArgs]:
        """The training data: the entries of `sources`, or one entry for each name in `file_name`."""
        args = self.student.data_args
        return source_parts(args.sources or (), args.file_name or ())

    @property
    def checkpoint_dir(self) -> Path:
        """The folder that holds the checkpoint-<N> folders."""
        return Path(self.checkpoint_config.output_dir or self.output_dir)

    @property
    def log_dir(self) -> Path:
        """The folder of the log files."""
        return Path(self.logging_dir) if self.logging_dir else Path(self.output_dir) / "logs"

    @property
    def trackers(self) -> dict[str, dict[str, Any]]:
        """The arguments of each tracker of track_with, by name."""
        if isinstance(self.track_with, str):
            return {self.track_with: self.tracker_kwargs}
        return {name: self.tracker_kwargs.get(name) or {} for name in self.track_with}

    @property
    def device_mapping(self) -> list[int] | None:
        """The devices of the student, one rank each; None if the launcher decides.

        The teacher's mapping counts if the student has none and the teacher is not a service.
        """
        shared = None if self.teacher.service is not None else self.teacher.device_mapping
        return self.student.device_mapping or shared

    @property
    def generator_devices(self) -> list[int]:
        """Number of the generator's own devices that each rank of the student uses: engine e is that of rank e modulo ranks.

        Empty if the generator has no devices of its own.
        """
        if self.rollout is None or self.rollout.device_mapping is None:
            return []
        size, ranks = self.rollout.generator_kwargs.get("tensor_parallel_size", 1), len(self.device_mapping or [0])
        return [size * len(range(rank, len(self.rollout.device_mapping) // size, ranks)) for rank in range(ranks)]

    @property
    def needs_worker_groups(self) -> bool:
        """Whether Ray places separate processes for each role.

        That is the case if the teacher is a service, has devices of its own, or shares devices with offloading.
        """
        ours, theirs = self.student.device_mapping, self.teacher.device_mapping
        apart = ours is not None and theirs is not None and (ours != theirs or self.offloads_colocated)
        return self.has_teacher and (apart or self.teacher.service is not None)

    @property
    def offloads_colocated(self) -> bool:
        """Whether student and teacher share devices and the inactive one is offloaded."""
        shared = set(self.student.device_mapping or ()) & set(self.teacher.device_mapping or ())
        can = shared and self.has_teacher and self.teacher.service is None
        offload = all(role.strategy_args.offloads for role in (self.student, self.teacher))
        return bool(self.is_offload_states and can and offload)

    @property
    def transfers_directly(self) -> bool:
        """Whether signals are sent from worker to worker without Ray's object store."""
        direct = self.logits_transfer_backend not in ("auto", "ray")
        return direct and self.needs_worker_groups and not self.offloads_colocated

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of the run, and of both roles if they share their processes."""
        shared = {} if self.needs_worker_groups else {**self.student.system_envs, **self.teacher.system_envs}
        return {**self.system_envs, **shared}
