"""Which files are learned from and measured on, and how their rows become text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from limbeck.config.schema.base import Files, Section

RowFormat = Literal["question_answer", "messages", "conversations", "prompt_completion", "instruction", "text"]


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


Sources = Annotated[list[dict[str, Any]], AfterValidator(_known_sources)]


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
        "unset, detected from the first row of each file.",
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


class ValidationDataArgs(Section):
    """Which files the student is measured on."""

    file_name: Files | None = Field(default=None, description="Validation files: JSON or JSONL; one name or a list.")


class ValidationConfig(Section):
    """What the student is measured on while it trains."""

    data_args: ValidationDataArgs = Field(
        default_factory=ValidationDataArgs, description="Which files the student is measured on."
    )
