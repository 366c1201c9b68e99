"""Every key that a run understands, with its type, its default, its meaning and the combinations that contradict.

The names are those of ROLL's distillation pipeline wherever it has one; spellings that only ROLL knows are translated
before they reach this file (`roll.py`). Nothing here reads files or knows how any key is carried out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from limbeck.config.device_mapping import parse_device_mapping

Dtype = Literal["fp32", "bf16", "fp16"]
OBJECTIVES = (
    "forward_kl",
    "reverse_kl",
    "adaptive_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "js_divergence",
    "mixed_kl",
    "symmetric_kl",
    "tvd",
    "alpha_beta",
    "taid",
    "cross_entropy",
)
Tail = Literal["renormalize", "bucket", "drop", "uniform", "zero"]
FAULTS = (
    "unshifted_mask",
    "every_token",
    "base_vocabulary",
    "zero_padded_vocabulary",
    "mean_over_vocabulary",
    "mean_of_micro_batches",
)
"""What other systems do wrong and ``objective_faults`` does again; see docs/objectives.md."""

SERVICE_NAME = r"^[A-Za-z0-9._-]+$"
"""What a teacher service can be called."""

FEATURE_LOSSES = ("cosine", "mse", "l1", "smooth_l1")
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
Packing = Literal["best_fit_decreasing", "modified_first_fit_decreasing"]
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

OBJECTIVE_KEYS: dict[str, tuple[str, ...]] = {
    "adaptive_kl_alpha": ("adaptive_kl",),
    "skew_lambda": ("skewed_forward_kl", "skewed_reverse_kl"),
    "js_beta": ("js_divergence",),
}
"""Which objectives read which of the keys that shape one."""


@dataclass(frozen=True)
class Contradiction:
    """One key whose value does not fit the rest: its dotted path, and a sentence's end ("needs a teacher; set ...")."""

    path: str
    sentence: str


class ContradictionError(ValueError):
    """All contradictions of one configuration, so that a user meets them in one go."""

    def __init__(self, contradictions: list[Contradiction]) -> None:
        super().__init__("; ".join(f"{found.path} {found.sentence}" for found in contradictions))
        self.contradictions = tuple(contradictions)


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _comma_list(value: object) -> object:
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return value


def _environment_text(value: object) -> object:
    if not isinstance(value, dict):
        return value
    # An environment holds text only; RAY_PROFILING: 0 can mean nothing but "0", whereas true could be "true" or "1".
    return {
        str(name): str(text) if isinstance(text, (int, float)) and not isinstance(text, bool) else text
        for name, text in value.items()
    }


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        # Only a name that does not come with the package is worth the time that importing torch takes.
        from limbeck.objectives.divergences import names

        if name not in names():
            near = difflib.get_close_matches(name, names(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"is not one of {', '.join(names())}{hint}")
    return name


def _run_plugins(files: list[str]) -> list[str]:
    from limbeck.errors import LimbeckError
    from limbeck.plugins import load_plugin

    for file in files:
        try:
            load_plugin(file)
        except LimbeckError as error:
            raise ValueError(str(error)) from error
    return files


def _feature_pair(entry: list[str]) -> list[str]:
    if len(entry) not in (2, 3) or not all(entry):
        raise ValueError("is not a pair; write [student submodule, teacher submodule] or [student, teacher, loss]")
    if len(entry) == 3 and entry[2] not in FEATURE_LOSSES:
        near = difflib.get_close_matches(entry[2], FEATURE_LOSSES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"has a loss that is none of {', '.join(FEATURE_LOSSES)}{hint}")
    return entry


def _two_names(names: list[str]) -> list[str]:
    if len(names) != 2 or not all(names):
        raise ValueError("must name two output heads: [the student's, the teacher's]")
    return names


Files = Annotated[list[str], BeforeValidator(_one_or_many)]
CommaList = Annotated[str, BeforeValidator(_comma_list)]
Sources = Annotated[list[dict[str, Any]], AfterValidator(lambda value: _known_sources(value))]
RowFormat = Literal["question_answer", "messages", "conversations", "prompt_completion", "instruction", "text"]
Environment = Annotated[dict[str, str], BeforeValidator(_environment_text)]
Objective = Annotated[str, AfterValidator(_known_objective)]
FeaturePair = Annotated[list[str], AfterValidator(_feature_pair)]
TwoNames = Annotated[list[str], AfterValidator(_two_names)]
Devices = Annotated[list[int] | None, BeforeValidator(parse_device_mapping)]


def _known_sources(value: object) -> object:
    """Check a list of sources entry by entry; what is kept are the entries as they were written."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        for number, entry in enumerate(value):
            try:
                SourceArgs.model_validate(entry)
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(str(part) for part in first["loc"])
                said = "is not a key of a source" if first["type"] == "extra_forbidden" else first["msg"]
                known = ", ".join(SourceArgs.model_fields)
                raise ValueError(
                    f"is wrong in entry {number}{': ' + key if key else ''} {said}; a source has {known}"
                ) from error
    return value


class Section(BaseModel):
    """A block of keys. Unknown keys are errors, values are frozen, and NaN is not a number that anybody meant."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        validate_default=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _mean_what_yaml_says(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[str(info.field_name)].annotation
        is_section = isinstance(annotation, type) and issubclass(annotation, Section)
        if value is None and (is_section or get_origin(annotation) is dict):
            return {}  # `strategy_config: ~`, or a key with nothing after its colon
        # Python counts True as 1, so `learning_rate: true` would otherwise train with a rate of 1.
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("is a switch (true or false) where a value belongs")
        return value


class ModelArgs(Section):
    """Which checkpoint, and how it is loaded."""

    model_name_or_path: str | None = Field(
        default=None,
        description="Folder or Hugging Face id of the checkpoint; unset, `student_pretrain` or `teacher_pretrain`.",
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the Hugging Face hub; unset, the repository's main branch."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Allow the checkpoint to bring and run its own Python code. Only for sources you trust.",
    )
    model_config_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Values that replace those of the checkpoint's config.json; with from_scratch and no checkpoint, "
        "the whole of it (with `model_type`).",
    )
    from_scratch: bool = Field(
        default=False,
        description="Build the architecture with fresh random weights instead of loading the checkpoint's.",
    )
    dtype: Dtype = Field(
        default="bf16",
        description="Number format in which the model computes: fp32, bf16 or fp16 (torch's names work).",
    )
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = Field(
        default="auto",
        description="Attention kernel; auto lets transformers choose, fa2 is short for flash_attention_2. The flash and "
        "flex ones train on GPUs only.",
    )

    @property
    def names_a_model(self) -> bool:
        """Whether there is a model to load or, from scratch, to make."""
        return self.model_name_or_path is not None or (self.from_scratch and "model_type" in self.model_config_kwargs)


class StudentModelArgs(ModelArgs):
    """Which checkpoint the student starts from, and which of its parameters are trained."""

    disable_gradient_checkpointing: bool | None = Field(
        default=None,
        description="True keeps all activations (faster); false recomputes them (far less memory); unset, they are "
        "recomputed on GPUs and kept on CPUs.",
    )
    gradient_checkpointing_use_reentrant: bool | None = Field(
        default=None, description="Which of torch's two checkpointing variants to use; unset, the non-reentrant one."
    )
    freeze_module_prefix: CommaList | None = Field(
        default=None, description="Name prefixes of student parameters that are not trained, separated by commas."
    )
    lora_target: CommaList | None = Field(
        default=None,
        description="Train LoRA adapters on these modules: names separated by commas, a regular expression, or "
        "all-linear.",
    )
    lora_rank: int = Field(default=8, ge=1, description="Rank of the LoRA adapters.")
    lora_alpha: int | None = Field(
        default=None, ge=1, description="Scale of the LoRA adapters (alpha / rank is applied); unset, 2 x lora_rank."
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout probability in front of the LoRA adapters."
    )
    additional_target: CommaList | None = Field(
        default=None,
        description="Modules trained in full beside LoRA, separated by commas, such as embed_tokens,lm_head.",
    )


class SourceArgs(Section):
    """One entry of `data_args.sources`."""

    path: Files | None = Field(
        default=None, description="Files, globs or a folder saved by datasets; a name or a list."
    )
    hub: str | None = Field(default=None, description="A hub dataset, owner/name.")
    config: str | None = Field(default=None, description="The hub dataset's configuration.")
    split: str | None = Field(default=None, description="Split of a hub dataset or saved folder; unset, train.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub dataset.")
    format: RowFormat | None = Field(default=None, description="Shape of its rows; unset, `data_args.format`.")
    weight: float | None = Field(
        default=None, ge=0, description="Its share of an epoch's rows, beside the other weights."
    )
    max_samples: int | None = Field(default=None, ge=1, description="At most so many of its rows, drawn by the seed.")
    domain: str | None = Field(default=None, description="Name under which it is mixed; unset, its own.")

    @model_validator(mode="after")
    def _named_once(self) -> SourceArgs:
        if (self.path is None) == (self.hub is None):
            raise ValueError("needs either path or hub")
        if self.hub is None and (self.config or self.revision):
            raise ValueError("has config or revision, which only a hub dataset has")
        return self


class DataArgs(Section):
    """Which files the student learns from, and how a row becomes text."""

    file_name: Files | None = Field(
        default=None,
        description="Training data: files (JSON, JSONL, CSV, TSV, Parquet, Arrow, .bin/.idx), globs, folders saved by "
        "datasets, or hub:owner/name; one name or a list, read in this order.",
    )
    sources: Sources | None = Field(
        default=None,
        description="Training data as a list of sources, each `path` or `hub`, with `config`, `split`, `revision`, "
        "`format`, `weight`, `max_samples` and `domain` as needed; instead of file_name.",
    )
    eval_file_name: Files | None = Field(
        default=None, description="Validation files, as an alternative to `validation.data_args.file_name`."
    )
    template: str | None = Field(
        default=None,
        description="Chat template: native (the tokenizer's own), a template's name, a .jinja file or Jinja source; "
        "unset, native if the tokenizer has one, else base.",
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Values passed on to the chat template, such as `enable_thinking: false`."
    )
    default_system: str | None = Field(
        default=None, description="System message of conversations that bring none; unset, none is added."
    )
    prompt_file: str | None = Field(
        default=None,
        description="Text file with `{}` in it, once: the first question of a conversation is put there before the "
        "template is applied. Braces that stay are doubled.",
    )
    train_on: Literal["all", "last"] = Field(
        default="all", description="Learn all answers of a conversation, or the last one only."
    )
    format: RowFormat | None = Field(
        default=None,
        description="Shape of the rows: question_answer, messages, conversations, prompt_completion, instruction or text; "
        "unset, judged by the first row of each file.",
    )
    weight_key: str | None = Field(
        default="weight", description="Column that multiplies a row's loss, where a row has it; `null` reads none."
    )
    domain_key: str | None = Field(
        default=None, description="Column that names a row's domain; unset, a source is a domain."
    )
    domain_interleave_probs: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None, description="Share of each domain in an epoch's rows; the values add up to 1."
    )
    mixing_temperature: float | None = Field(
        default=None,
        gt=0,
        description="Share of each domain in an epoch's rows, proportional to its rows^(1 / this); unset, all rows.",
    )
    num_samples: int | None = Field(
        default=None, ge=1, description="Rows in an epoch, drawn by the seed; unset, as many as there are."
    )
    overlong: Literal["truncate", "drop", "split"] = Field(
        default="truncate",
        description="What happens to rows longer than sequence_length: truncate cuts them from the right, drop leaves them "
        "out, split makes several rows of each.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="What happens to a row that cannot be read: error stops before training, skip leaves it out and lists it.",
    )
    preprocessing_num_workers: int | None = Field(
        default=None,
        ge=1,
        description="Processes that tokenise; unset, one for little data, else one for each core, up to 8.",
    )
    cache_path: str | None = Field(
        default=None,
        description="Folder that keeps tokenised data for the next run with the same files; unset, LIMBECK_CACHE or "
        "`~/.cache/limbeck/tokens`.",
    )


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


class StrategyConfig(Section):
    """How a strategy spreads a model over the ranks; none of these keys changes what is computed beyond rounding."""

    fsdp_size: int | None = Field(
        default=None,
        ge=2,
        description="Ranks that share one copy of the model, such groups being replicas of each other; unset, or when "
        "there are no more ranks than this, all ranks share one copy.",
    )
    tensor_model_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Neighbouring ranks among which every matrix is sliced; they work on the same rows (tensor parallelism).",
    )
    context_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Ranks among which the time of every row is divided (Ulysses context parallelism).",
    )
    replicate: bool = Field(
        default=False,
        description="Keep a whole copy of the model on every rank instead of sharding it (as ZeRO stage 0).",
    )
    reshard_after_forward: bool | None = Field(
        default=None,
        description="Free gathered parameters after the forward pass (less memory, one more gather); unset, true.",
    )
    param_dtype: Dtype | None = Field(
        default=None, description="Number format of the gathered parameters and of compute; unset, `model_args.dtype`."
    )
    reduce_dtype: Dtype = Field(
        default="fp32", description="Number format in which gradients are summed over the ranks."
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed's own configuration (zero_optimization and what stands beside it), for deepspeed_train and "
        "deepspeed_infer; its keys may also stand in strategy_config itself. What the run decides stays auto.",
    )


class StrategyArgs(Section):
    """How one model is spread over the ranks."""

    strategy_name: Literal["hf_infer", "fsdp2_train", "fsdp2_infer", "deepspeed_train", "deepspeed_infer"] | None = (
        Field(
            default=None,
            description="fsdp2_train or deepspeed_train for the student; fsdp2_infer, deepspeed_infer or hf_infer (a whole "
            "copy on each rank) for the teacher; unset, whole on a single rank and FSDP2 on several.",
        )
    )
    strategy_config: StrategyConfig = Field(
        default_factory=StrategyConfig, description="Details of the strategy; see the keys below it."
    )


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


class FeaturesConfig(Section):
    """Which inner states of student and teacher are compared beside their logits."""

    pairs: list[FeaturePair] = Field(
        default_factory=list,
        description="Submodules whose outputs are compared: a list of [student, teacher] (cosine) or [student, teacher, "
        f"loss], loss being one of {', '.join(FEATURE_LOSSES)}; a * in both names stands for the number of a layer.",
    )
    weight: float = Field(
        default=1.0, gt=0, description="What multiplies the mean of the pairs' losses before it joins the loss."
    )
    projection: Literal["per_pair", "shared"] = Field(
        default="per_pair",
        description="Where a pair's widths differ, a linear projection is trained: one for each such pair, or one shared "
        "by all of them.",
    )
    mask: Literal["tokens", "supervised"] = Field(
        default="tokens",
        description="Where features are compared: at every token that is not padding, or at supervised positions only.",
    )
    logit_layers: TwoNames | None = Field(
        default=None,
        description="ModelOpt's names of the output heads of student and teacher, checked against the models; unset, they "
        "are found.",
    )


class ValidationDataArgs(Section):
    """Which files the student is measured on."""

    file_name: Files | None = Field(default=None, description="Validation files: JSON or JSONL; one name or a list.")


class ValidationConfig(Section):
    """What the student is measured on while it trains."""

    data_args: ValidationDataArgs = Field(
        default_factory=ValidationDataArgs, description="Which files the student is measured on."
    )


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
        description="Faults of other systems to repeat, for whoever must meet their numbers: unshifted_mask, every_token, "
        "base_vocabulary, zero_padded_vocabulary, mean_over_vocabulary, mean_of_micro_batches.",
    )
    kd_objective: Objective = Field(
        default="forward_kl",
        description=f"Divergence between the teacher's and the student's next-token distributions: "
        f"{', '.join(OBJECTIVES)}, or one that a plugin registers.",
    )
    kd_objective_kwargs: dict[str, float | str] = Field(
        default_factory=dict,
        description="What else shapes the divergence: mixed_kl: forward (its weight); alpha_beta: alpha, beta; taid: t_start, "
        "t_end, rate, momentum; adaptive_kl: head (roll or paper); for your own: its parameters.",
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
        description="0 compares whole vocabularies, exactly; k > 0 compares the teacher's k likeliest tokens only, "
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
        contradictions = list(self._contradictions())
        if contradictions:
            raise ContradictionError(contradictions)
        return self

    def _contradictions(self) -> Iterator[Contradiction]:
        yield from self._model_contradictions()
        yield from self._training_contradictions()
        yield from self._placement_contradictions()

    def _model_contradictions(self) -> Iterator[Contradiction]:
        student, teacher = self.student.model_args, self.teacher.model_args
        if not student.names_a_model:
            yield Contradiction("student_pretrain", "is not set; name the student's checkpoint, a folder or a hub id")
        elif self.tokenizer_name_or_path is None:
            yield Contradiction("tokenizer", "is not set, and there is no checkpoint to take one from; name one")
        if not teacher.names_a_model and self.distill_loss_weight > 0:
            yield Contradiction(
                "teacher_pretrain",
                f"is not set, but distill_loss_weight = {self.distill_loss_weight:g} needs a teacher; name its "
                "checkpoint, or set distill_loss_weight: 0 to train on the answers alone",
            )
        if self.features.pairs and not teacher.names_a_model:
            yield Contradiction("features.pairs", "need a teacher to compare with; name one with teacher_pretrain")
        if self.features.pairs and student.gradient_checkpointing_use_reentrant:
            yield Contradiction(
                "student.model_args.gradient_checkpointing_use_reentrant",
                "= true hides the layers' insides from features.pairs; set it to false",
            )
        if self.loss_balance == "modelopt" and self.distill_loss_weight == 0:
            yield Contradiction(
                "loss_balance", "= modelopt scales to the divergence of the logits; set distill_loss_weight above 0"
            )
        if self.objective_faults:
            others = {
                "cross_tokenizer": self.cross_tokenizer != "off",
                "features.pairs": bool(self.features.pairs),
                "loss_balance": self.loss_balance != "weighted",
                "distill_loss_weight = 0": self.distill_loss_weight == 0,
            }
            for other in (name for name, given in others.items() if given):
                yield Contradiction("objective_faults", f"do not go with {other}; remove one of them")
            both = [name for name in ("unshifted_mask", "every_token") if name in self.objective_faults]
            if len(both) == 2:
                yield Contradiction("objective_faults", f"has both {' and '.join(both)}, which contradict; keep one")
        for role, pretrain, model_args in (
            ("student", self.student_pretrain, student),
            ("teacher", self.teacher_pretrain, teacher),
        ):
            if pretrain is not None and pretrain != model_args.model_name_or_path:
                yield Contradiction(
                    f"{role}_pretrain",
                    f"= {pretrain} is not {role}.model_args.model_name_or_path = {model_args.model_name_or_path}; "
                    "they mean the same, so give only one",
                )
        if student.lora_target is None and student.additional_target is not None:
            yield Contradiction(
                "student.model_args.additional_target",
                "names modules to train beside LoRA; set student.model_args.lora_target too",
            )

        if self.cross_tokenizer != "off":
            if teacher.model_name_or_path is None:
                yield Contradiction(
                    "cross_tokenizer", f"= {self.cross_tokenizer} needs the teacher's tokenizer; set teacher_pretrain"
                )
            if self.logits_topk:
                yield Contradiction(
                    "logits_topk", "does not go with cross_tokenizer, which compares whole vocabularies; set it to 0"
                )
            if self.features.pairs:
                yield Contradiction(
                    "features.pairs", "compare states token by token, which cross_tokenizer has no pairs of; remove one"
                )
            if self.loss_balance != "weighted":
                yield Contradiction(
                    "loss_balance", f"= {self.loss_balance} does not go with cross_tokenizer; use weighted"
                )

    def _training_contradictions(self) -> Iterator[Contradiction]:
        student, training = self.student, self.student.training_args
        data = student.data_args
        if not data.file_name and not data.sources:
            yield Contradiction("student.data_args.file_name", "is not set; name the file or files to learn from")
        if data.file_name and data.sources:
            yield Contradiction("student.data_args.sources", "and file_name name the data twice; give only one")
        mixing = {
            "sources": any(entry.get("weight") is not None for entry in data.sources or ()),
            "mixing_temperature": data.mixing_temperature is not None,
            "domain_interleave_probs": data.domain_interleave_probs is not None,
        }
        if sum(mixing.values()) > 1:
            names = [name if name != "sources" else "the weights of sources" for name, given in mixing.items() if given]
            yield Contradiction(
                f"student.data_args.{next(name for name, given in reversed(mixing.items()) if given)}",
                f"is one of several shares ({' and '.join(names)}); give only one of them",
            )
        if student.data_args.eval_file_name and self.validation and self.validation.data_args.file_name:
            yield Contradiction(
                "student.data_args.eval_file_name", "and validation.data_args.file_name mean the same; give only one"
            )
        if student.use_dynamic_batching_in_train:
            if student.max_tokens_per_microbatch_in_train == 0:
                yield Contradiction(
                    "student.use_dynamic_batching_in_train",
                    "needs student.max_tokens_per_microbatch_in_train, the tokens that one micro-batch may hold",
                )
            elif student.max_tokens_per_microbatch_in_train < self.sequence_length:
                yield Contradiction(
                    "student.max_tokens_per_microbatch_in_train",
                    f"= {student.max_tokens_per_microbatch_in_train} cannot hold one row of sequence_length = "
                    f"{self.sequence_length} tokens; raise the one or lower the other",
                )
        scheduler, kwargs = training.lr_scheduler_type, training.lr_scheduler_kwargs
        needed = REQUIRED_SCHEDULER_KWARGS.get(scheduler, ())
        if needed and not any(key in kwargs for key in needed):
            yield Contradiction(
                "student.training_args.lr_scheduler_type",
                f"= {scheduler} needs {' or '.join(needed)} in student.training_args.lr_scheduler_kwargs",
            )
        readable = SCHEDULER_KWARGS.get(scheduler, ())
        for key in kwargs:
            if key not in readable:
                yield Contradiction(
                    f"student.training_args.lr_scheduler_kwargs.{key}",
                    f"means nothing to lr_scheduler_type = {scheduler}, which reads {', '.join(readable) or 'none'}",
                )
        if self.track_with in TRACKER_KWARGS:
            known = TRACKER_KWARGS[self.track_with]
            for key in self.tracker_kwargs:
                if key not in known:
                    yield Contradiction(
                        f"tracker_kwargs.{key}",
                        f"means nothing to track_with = {self.track_with}, which reads {', '.join(known) or 'none'}",
                    )

    def _placement_contradictions(self) -> Iterator[Contradiction]:
        student, teacher = self.student, self.teacher
        for role, strategy, wrong, right in (
            ("student", student.strategy_args, ("hf_infer", "fsdp2_infer", "deepspeed_infer"), "fsdp2_train"),
            ("teacher", teacher.strategy_args, ("fsdp2_train", "deepspeed_train"), "fsdp2_infer"),
        ):
            path = f"{role}.strategy_args.strategy_name"
            if strategy.strategy_name in wrong:
                trained = "is trained" if role == "student" else "is never trained"
                yield Contradiction(path, f"= {strategy.strategy_name} does not fit: the {role} {trained}; use {right}")
            yield from _foreign_strategy_keys(strategy, role)
            if strategy.strategy_config.replicate and strategy.strategy_config.fsdp_size is not None:
                yield Contradiction(
                    f"{role}.strategy_args.strategy_config.replicate", "contradicts fsdp_size beside it; give only one"
                )
        if self.num_gpus_per_node is not None and self.device_mapping:
            there = self.num_nodes * self.num_gpus_per_node
            largest = max([*self.device_mapping, *(teacher.device_mapping or ())])
            if largest >= there:
                yield Contradiction(
                    "num_gpus_per_node",
                    f"= {self.num_gpus_per_node} on {self.num_nodes} machine(s) makes {there} devices, but device_mapping "
                    f"names device {largest} (they are numbered from 0); correct one of them",
                )
        if self.num_gpus_per_node is None and self.num_nodes > 1 and self.device_mapping:
            yield Contradiction(
                "num_nodes", f"= {self.num_nodes} does not say which device is where; set num_gpus_per_node too"
            )
        if teacher.service is not None and not self.has_teacher:
            yield Contradiction(
                "teacher.service", "needs to know which checkpoint it is to serve; set teacher_pretrain to that"
            )
        if self.needs_worker_groups and self.features.pairs:
            yield Contradiction(
                "features.pairs",
                "needs the teacher's inner states, which are not sent between worker groups; give teacher.device_mapping "
                "the student's devices, and no teacher.service",
            )
        environments = (
            ("system_envs", self.system_envs),
            ("student.system_envs", student.system_envs),
            ("teacher.system_envs", teacher.system_envs),
        )
        seen: dict[str, tuple[str, str]] = {}
        for path, environment in environments:
            for name, value in environment.items():
                first_path, first = seen.setdefault(name, (path, value))
                if first != value and not self.needs_worker_groups:
                    yield Contradiction(
                        f"{path}.{name}",
                        f"= {value} contradicts {first_path}.{name} = {first}; student and teacher share one process",
                    )

    def unread_keys(self) -> Iterator[tuple[str, str]]:
        """Keys that change nothing in this combination, each with the reason; whoever set one will want to know."""
        for key, objectives in OBJECTIVE_KEYS.items():
            if self.kd_objective not in objectives:
                yield key, f"shapes {' and '.join(objectives)} only, and kd_objective is {self.kd_objective}"
        if self.cross_tokenizer == "off":
            for key in ("rest_weight", "merge", "tokens"):
                yield f"cross_tokenizer_{key}", "is read with cross_tokenizer only"
        else:
            yield "compile_loss", "is not read with cross_tokenizer, whose loss is not compiled"
        if self.cross_tokenizer == "uld":
            for key in ("kd_objective", "cross_tokenizer_rest_weight"):
                yield key, "is not read with cross_tokenizer: uld, which sorts everything"
        if not self.needs_worker_groups and self.num_nodes == 1:
            for key in ("max_restarts", "student.backend_timeout", "teacher.backend_timeout"):
                yield key, "is read with worker groups only: where student and teacher have different devices"
        if not self.device_mapping:
            for key in ("num_gpus_per_node", "num_nodes"):
                yield key, "is read with device_mapping only; without one there is one process, or torchrun's"
        if self.objective_faults:
            yield "compile_loss", "is not read with objective_faults, whose loss is not compiled"
        if self.logits_topk == 0:
            yield "logits_topk_tail", "is read with logits_topk only"
        if not self.features.pairs:
            for key in ("weight", "projection", "mask"):
                yield f"features.{key}", "is read with features.pairs only"
        elif self.loss_balance == "modelopt":
            yield "features.weight", "yields to loss_balance: modelopt"
        student = self.student
        if not student.use_dynamic_batching_in_train:
            yield "student.max_tokens_per_microbatch_in_train", "is read with use_dynamic_batching_in_train: true only"
        if not student.use_sequence_packing:
            yield "student.packing_algorithm", "is read with use_sequence_packing: true only"
        else:
            yield "student.training_args.group_by_length", "is not read with use_sequence_packing, which pads nothing"
        if student.model_args.lora_target is None:
            for key in ("lora_rank", "lora_alpha", "lora_dropout"):
                yield f"student.model_args.{key}", "is read with lora_target only"
        if student.model_args.disable_gradient_checkpointing:
            key = "student.model_args.gradient_checkpointing_use_reentrant"
            yield key, "is read with disable_gradient_checkpointing: false only"
        if student.training_args.lr_scheduler_type == "constant":
            for key in ("warmup_steps", "warmup_ratio"):
                yield (
                    f"student.training_args.{key}",
                    "is not read by lr_scheduler_type: constant; use constant_with_warmup",
                )
        elif student.training_args.warmup_steps > 0:
            yield "student.training_args.warmup_ratio", "yields to warmup_steps"
        if self.distill_on_prompt:
            yield "student.data_args.train_on", "chooses among answers, and distill_on_prompt: true learns every token"
        if not self.validation_files:
            yield "eval_steps", "measures nothing, as no validation files are named"

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is named."""
        return self.teacher.model_args.names_a_model

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
        """The devices of the student, one rank each; None when the launcher decides. Named for one role, they are both's,
        unless the teacher is a service."""
        shared = None if self.teacher.service is not None else self.teacher.device_mapping
        return self.student.device_mapping or shared

    @property
    def needs_worker_groups(self) -> bool:
        """Whether the teacher is a service or has devices of its own, so that each role is processes that Ray places."""
        ours, theirs = self.student.device_mapping, self.teacher.device_mapping
        apart = ours is not None and theirs is not None and ours != theirs
        return self.has_teacher and (apart or self.teacher.service is not None)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of the run and of both roles, if these share one process."""
        shared = {} if self.needs_worker_groups else {**self.student.system_envs, **self.teacher.system_envs}
        return {**self.system_envs, **shared}


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, or None if it holds a value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _foreign_strategy_keys(strategy: StrategyArgs, role: str) -> Iterator[Contradiction]:
    """Keys of DeepSpeed beside another strategy's name, and the reverse."""
    given, path = strategy.strategy_config, f"{role}.strategy_args.strategy_config"
    if not (strategy.strategy_name or "").startswith("deepspeed"):
        if given.deepspeed:
            which = "deepspeed_train" if role == "student" else "deepspeed_infer"
            yield Contradiction(
                f"{path}.deepspeed", f"is read by strategy_name: {which} only; set that, or take it out"
            )
        return
    for key, field in type(given).model_fields.items():
        if key != "deepspeed" and getattr(given, key) != field.get_default(call_default_factory=True):
            yield Contradiction(f"{path}.{key}", f"is not read by {strategy.strategy_name}; take it out")
    optimization = given.deepspeed.get("zero_optimization")
    stages = (1, 2, 3) if strategy.strategy_name == "deepspeed_train" else (3,)
    if not isinstance(optimization, Mapping) or optimization.get("stage") not in stages:
        yield Contradiction(
            f"{path}.deepspeed",
            f"needs zero_optimization with stage {' or '.join(map(str, stages))} for {strategy.strategy_name}; add it",
        )


def walk_keys(section: type[Section] = DistillConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value, by its dotted path, in the order of the schema."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            yield f"{prefix}{name}", field
        else:
            yield from walk_keys(inner, f"{prefix}{name}.")
