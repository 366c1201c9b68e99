"""Training and validation data, and how a row becomes text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from limbeck.config.schema.base import Files, Section
from limbeck.config.schema.named_datasets import NAMED_DATASETS, expand_name
from limbeck.config.schema.rollout import ValidationRolloutConfig

RowFormat = Literal["question_answer", "messages", "conversations", "prompt_completion", "instruction", "text"]


class SourceArgs(Section):
    """One entry of `data_args.sources`."""

    path: Files | None = Field(
        default=None, description="Files, globs or a folder saved by datasets; one name or a list."
    )
    hub: str | None = Field(
        default=None,
        description=f"A dataset on the Hugging Face hub: owner/name, or a short name: {', '.join(NAMED_DATASETS)}.",
    )
    config: str | None = Field(default=None, description="Configuration of the hub dataset.")
    split: str | None = Field(default=None, description="Split of the hub dataset or saved folder. If unset, train.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub dataset.")
    format: RowFormat | None = Field(default=None, description="Format of its rows. If unset, `data_args.format`.")
    question_key: str | None = Field(
        default=None,
        description="Column of the question in its rows. If unset, the top-level `question_key`. Dots lead into nested values: "
        "prompt.0.content.",
    )
    answer_key: str | None = Field(
        default=None, description="Column of the answer in its rows. If unset, the top-level `answer_key`."
    )
    weight: float | None = Field(
        default=None,
        ge=0,
        description="Its share of the rows of an epoch, relative to the weights of the other sources.",
    )
    max_samples: int | None = Field(default=None, ge=1, description="Maximum number of its rows, selected by the seed.")
    domain: str | None = Field(
        default=None, description="Domain of its rows. If unset, the source is a domain of its own."
    )

    concatenate: bool = Field(
        default=False,
        description="Read the .bin/.idx corpora of path as one text and cut it into rows of sequence_length tokens, as "
        "Megatron does. Rows are read from the files when they are needed; nothing is cached. All sources of the run "
        "must have it.",
    )
    documents: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = Field(
        default=(0.0, 1.0),
        description="With concatenate, the part of the documents that is read, as fractions: [0, 0.99] is the first 99 %.",
    )
    mock: int | None = Field(
        default=None,
        ge=1,
        description="Number of rows of made-up tokens, instead of path or hub: documents of consecutive token ids, the same in "
        "every run.",
    )

    @property
    def is_concatenated(self) -> bool:
        """Whether its rows are cut from documents that follow one another."""
        return self.concatenate or self.mock is not None

    @model_validator(mode="after")
    def _has_one_origin(self) -> SourceArgs:
        if sum(origin is not None for origin in (self.path, self.hub, self.mock)) != 1:
            raise ValueError("needs either path, hub or mock")
        if self.concatenate and self.path is None:
            raise ValueError("has concatenate, which needs a path of .bin/.idx files")
        if self.documents != (0.0, 1.0) and not self.concatenate:
            raise ValueError("has documents, which is only read with concatenate: true")
        if self.documents[0] >= self.documents[1]:
            raise ValueError("has documents that end before they begin; write [0, 0.99]")
        if self.hub is None and (self.config or self.revision):
            raise ValueError("has config or revision, which only a hub dataset has")
        return self


def source_parts(entries: Sequence[dict[str, Any]], names: Sequence[str]) -> list[SourceArgs]:
    """What entries of `sources` and names in `file_name` stand for: a named dataset may have several parts."""
    parts = [part for entry in entries for part in expand_name(entry)]
    return [*map(SourceArgs.model_validate, parts), *(part for name in names for part in sources_of_name(name))]


def sources_of_name(name: str) -> list[SourceArgs]:
    """What a name in `file_name` stands for."""
    entry = {"hub": name.removeprefix("hub:")} if name.startswith("hub:") else {"path": [name]}
    return [SourceArgs.model_validate(part) for part in expand_name(entry)]


def _known_sources(value: object) -> object:
    """Check each entry of a list of sources; the entries are returned unchanged."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        for number, entry in enumerate(value):
            try:
                SourceArgs.model_validate(entry)
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(str(part) for part in first["loc"])
                problem = "is not a key of a source" if first["type"] == "extra_forbidden" else first["msg"]
                known = ", ".join(SourceArgs.model_fields)
                raise ValueError(
                    f"is wrong in entry {number}{': ' + key if key else ''} {problem}; a source has {known}"
                ) from error
    return value


Sources = Annotated[list[dict[str, Any]], AfterValidator(_known_sources)]


class DataArgs(Section):
    """Training data, and how a row becomes text."""

    file_name: Files | None = Field(
        default=None,
        description="Training data: files (JSON, JSONL, CSV, TSV, Parquet, Arrow, .bin/.idx), globs, folders saved by "
        "datasets, hub:owner/name, or hub: and the short name of a dataset; one name or a list, read in order.",
    )
    sources: Sources | None = Field(
        default=None,
        description="Training data as a list of sources, instead of file_name. Each has `path` or `hub`, and "
        "optionally "
        "`config`, `split`, `revision`, `format`, `question_key`, `answer_key`, `weight`, `max_samples` and `domain`; "
        ".bin/.idx files may have `concatenate` and `documents`. `mock` makes rows up.",
    )
    eval_file_name: Files | None = Field(
        default=None, description="Validation files; the same as `validation.data_args.file_name`."
    )
    template: str | None = Field(
        default=None,
        description="Chat template: native (the tokenizer's), a built-in template, a .jinja file or Jinja source. If "
        "unset, native if the tokenizer has a template, else base.",
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables passed to the chat template, such as `enable_thinking: false`."
    )
    default_system: str | None = Field(
        default=None, description="System message of conversations without one. If unset, none is added."
    )
    prompt_file: str | None = Field(
        default=None,
        description="Text file that contains `{}` once. The first question of a conversation replaces it before the "
        "chat template is applied. Write `{{` and `}}` for braces.",
    )
    train_on: Literal["all", "last"] = Field(
        default="all", description="Train on all answers of a conversation, or only on the last one."
    )
    format: RowFormat | None = Field(
        default=None,
        description="Format of the rows: question_answer, messages, conversations, prompt_completion, instruction or "
        "text. If unset, it is detected from the first row of each file.",
    )
    weight_key: str | None = Field(
        default="weight",
        description="Column with the weight of a row in the loss; rows without it have weight 1. `null` disables "
        "weights.",
    )
    domain_key: str | None = Field(
        default=None, description="Column with the domain of a row. If unset, each source is a domain."
    )
    domain_interleave_probs: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None, description="Share of each domain in the rows of an epoch; the values add up to 1."
    )
    mixing_temperature: float | None = Field(
        default=None,
        gt=0,
        description="Sample domains in proportion to (number of rows)^(1 / mixing_temperature). If unset, every row is "
        "used.",
    )
    num_samples: int | None = Field(
        default=None, ge=1, description="Number of rows in an epoch, selected by the seed. If unset, all rows."
    )
    overlong: Literal["truncate", "drop", "split"] = Field(
        default="truncate",
        description="How rows longer than sequence_length are handled: truncate cuts the right end, drop removes the "
        "row, split divides it into several rows, whose prompts rollout cannot continue. Where rollout uses no answer of the "
        "data, drop removes rows whose prompt is too long.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="How rows that cannot be read are handled: error stops before training, skip removes and reports "
        "them.",
    )
    preprocessing_num_workers: int | None = Field(
        default=None,
        ge=1,
        description="Number of processes that tokenize. If unset, one for small data sets, else one per core, at most "
        "8.",
    )
    cache_path: str | None = Field(
        default=None,
        description="Folder of tokenized data, reused by runs with the same files. If unset, LIMBECK_CACHE or "
        "`~/.cache/limbeck/tokens`.",
    )


class ValidationDataArgs(Section):
    """Validation data."""

    file_name: Files | None = Field(default=None, description="Validation files; one name or a list.")
    sources: Sources | None = Field(
        default=None,
        description="Validation data as a list of sources, instead of file_name, with the keys of student.data_args.sources. "
        "Weights do not apply.",
    )


class ValidationConfig(Section):
    """Validation of the student during training."""

    data_args: ValidationDataArgs = Field(default_factory=ValidationDataArgs, description="Validation data.")
    at_start: bool = Field(default=False, description="Validate before the first step.")
    at_end: bool = Field(default=True, description="Validate after the last step.")
    rollout: ValidationRolloutConfig | None = Field(
        default=None,
        description="Let the student answer the validation prompts as well, and measure val/accuracy. Rows without an answer "
        "are then prompts only. If unset, only the loss is measured.",
    )
