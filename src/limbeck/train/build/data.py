"""Builds the data of a run from its configuration: tokenizer, training stream, validation batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.config import DistillConfig
from limbeck.config.schema import WorkerConfig
from limbeck.data import (
    DataReport,
    Examples,
    MixtureSettings,
    Source,
    StepBatch,
    StreamSettings,
    TokenizeSettings,
    Translator,
    check_same_tokenizer,
    fixed_batches,
    mix,
    tokenize_files,
)
from limbeck.data.encode import TOKENS
from limbeck.data.teacher_prompts import TeacherPrompt
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_tokenizer, model_limits
from limbeck.strategies.world import World
from limbeck.train.build.counts import reduce_counts
from limbeck.train.build.sources import training_sources, validation_sources
from limbeck.train.build.teacher_tokens import add_teacher_tokens
from limbeck.train.console import row_counter
from limbeck.train.metrics import METRICS_OF_ANSWERS, WRITTEN_METRICS
from limbeck.train.reference_quirks import train_padding
from limbeck.train.samples import answer_starts

Progress = Callable[[int], None]

_DOCUMENTS = ("text", TOKENS, "concatenated tokens")  # formats of rows that are no prompt with an answer


@dataclass(frozen=True)
class Data:
    """Tokenizer, training rows and validation batches of one rank, with the report on the rows.

    examples: the tokenised training rows; stream_settings: how they become steps. tokens and supervised_tokens: in
    one epoch.
    largest_token: the highest token id that occurs; longest_row: in tokens; num_tokens: ids that the tokenizer has.
    translator: adds the tokens of a teacher with another tokenizer. held_out: the validation rows, or None.
    longest_for_teacher: tokens of the longest row with the prompts that the teacher reads.
    """

    tokenizer: Any
    examples: Examples
    stream_settings: StreamSettings
    validation: list[StepBatch]
    report: str
    largest_token: int
    longest_row: int
    num_tokens: int
    tokens: int
    supervised_tokens: int
    translator: Translator | None = None
    held_out: Examples | None = None
    longest_for_teacher: int = 0


def cache_folder(config: DistillConfig) -> Path:
    """Where tokenised data is kept: ``cache_path``, else LIMBECK_CACHE, else the user's cache folder."""
    given = config.student.data_args.cache_path or os.environ.get("LIMBECK_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "limbeck" / "tokens"


def make_tokenizer(config: DistillConfig) -> Any:
    """The tokenizer of the run."""
    model, name = config.student.model_args, str(config.tokenizer_name_or_path)
    revision = model.revision if name == model.model_name_or_path else None
    return load_tokenizer(ModelSource(name, revision=revision, trust_remote_code=model.trust_remote_code))


def teacher_tokenizer(teacher: WorkerConfig) -> Any:
    """The teacher's tokenizer; None for a model without one (a bare folder, or a new model), which must use the
    student's.
    """
    args = teacher.model_args
    name = args.model_name_or_path
    alone = "tokenizer_model" not in args.megatron_arguments
    if name is None or (alone and Path(name).is_dir() and not any(Path(name).glob("tokenizer*"))):
        return None
    return load_tokenizer(ModelSource.from_args(args, "teacher"))


def make_data(config: DistillConfig, world: World, progress: Progress | None = None) -> Data:
    """Read, check and tokenise all rows.

    progress: called with the number of rows tokenised so far, on the main process.
    """
    training = config.student.training_args
    tokenizer = make_tokenizer(config)
    translator = None
    if config.cross_tokenizer != "off":
        translator = make_translator(config, tokenizer)
    elif config.has_teacher and (of_teacher := teacher_tokenizer(config.teacher)) is not None:
        check_same_tokenizer(tokenizer, of_teacher)

    if not world.is_main:
        world.barrier()  # the main process fills the cache, the others read it
    train, report = prepare_examples(config, tokenizer, show=world.is_main, progress=progress)
    held_out = prepare_validation(config, tokenizer, show=world.is_main, progress=progress)
    if world.is_main:
        world.barrier()
    if "trained_padding" in config.objective_faults:
        train = train_padding(train, config.sequence_length, tokenizer.pad_token_id)
    if config.writes_answers:
        _check_prompts(report)
        if held_out is not None and config.effective_validation.rollout is not None:
            _check_prompts(held_out[1])
    mixture = mix(train, report, mixture_settings(config), config.data_seed)
    text = f"training: {report}" + (f"\nmixture: {mixture}" if mixture else "")
    if train.weights is not None:
        column = config.student.data_args.weight_key
        text += f"\nweights: rows or turns count differently, by the column {column!r} or a turn's own weight"
    settings = StreamSettings(
        seed=config.data_seed,
        sequence_length=config.sequence_length,
        per_device_batch_size=training.per_device_train_batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        packing=config.student.use_sequence_packing,
        group_by_length=training.group_by_length,
        packing_algorithm=config.student.packing_algorithm,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        length_round=config.student.sequence_length_round_in_train,
        pad_id=tokenizer.pad_token_id,
        rows_of_epoch=mixture.rows_of_epoch if mixture else None,
    )
    validation: list[StepBatch] = []
    largest, longest, of_teacher = report.largest_token, int(train.lengths.max()), _longest_for_teacher(config, train)
    if held_out is not None:
        caps = tuple(entry.max_samples for entry in config.validation_sources)
        chosen = mix(*held_out, MixtureSettings(max_samples=caps), config.data_seed)
        rows = np.arange(len(held_out[0])) if chosen is None else chosen.rows_of_epoch(0)
        rows = rows[held_out[0].num_supervised[rows] > 0]  # prompts without an answer are for validation.rollout only
        validation = fixed_batches(
            held_out[0],
            batch_size=config.student.infer_batch_size,
            rank=world.data_rank,
            world_size=world.dims.data_size,
            pad_id=tokenizer.pad_token_id,
            length_round=config.student.sequence_length_round_in_train,
            rows=rows,
        )
        validation = reduce_counts(validation, world)
        if translator is not None:
            validation = add_teacher_tokens(validation, translator, world)
        text += f"\nvalidation: {held_out[1]}" + (
            f"\nvalidation takes {sum(chosen.counts):,} of these rows, selected by the seed." if chosen else ""
        )
        best = config.checkpoint_config.best_metric
        if not validation and best in METRICS_OF_ANSWERS:
            text += (
                f"\nvalidation: no row has an answer, so that {best} (checkpoint_config.best_metric) is not measured and no "
                f"checkpoint is the best; set best_metric to a metric of written answers: {', '.join(WRITTEN_METRICS)}."
            )
        largest = max(largest, held_out[1].largest_token)
        longest = max(longest, int(held_out[0].lengths.max()))
        of_teacher = max(of_teacher, _longest_for_teacher(config, held_out[0]))
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    tokens, supervised = report.tokens, report.supervised_tokens
    if config.rollout is not None and not config.needs_answers:  # what will be written decides what is compiled
        expected = int((train.num_supervised == 0).sum()) * config.rollout.max_new_tokens
        tokens, supervised = tokens + expected, supervised + expected
    return Data(
        tokenizer,
        train,
        settings,
        validation,
        text,
        largest,
        longest,
        num_tokens,
        tokens,
        supervised,
        translator,
        None if held_out is None else held_out[0],
        of_teacher,
    )


def _check_prompts(report: DataReport) -> None:
    """Raise LimbeckError for rows that have no prompt."""
    for file in report.files:
        if file.format in _DOCUMENTS:
            raise LimbeckError(
                f"{file.path} has rows of {file.format}, in which no prompt ends where an answer begins, and rollout continues "
                "prompts; give rows with questions, or set rollout.on_policy_fraction: 0 without validation.rollout."
            )


def make_translator(config: DistillConfig, tokenizer: Any) -> Translator:
    """Converts the student's batches into the teacher's tokens, for a teacher with another tokenizer."""
    source = ModelSource.from_args(config.teacher.model_args, "teacher")
    teacher = load_tokenizer(source)
    length, size = model_limits(source)
    return Translator(
        tokenizer, teacher, tokens=config.cross_tokenizer_tokens, teacher_length=length, teacher_size=size
    )


def prepare_examples(
    config: DistillConfig, tokenizer: Any, *, show: bool = True, progress: Progress | None = None
) -> tuple[Examples, DataReport]:
    """The training rows as tokens, from the cache or into it.

    show: draw a counter if this is a terminal. progress: called with the number of rows tokenised so far.

    Raises LimbeckError for anything wrong with any row, unless ``on_bad_row`` is ``skip``.
    """
    return _tokenized(config, tokenizer, training_sources(config), token_settings(config), show, progress)


def prepare_validation(
    config: DistillConfig, tokenizer: Any, *, show: bool = True, progress: Progress | None = None
) -> tuple[Examples, DataReport] | None:
    """The same for the validation rows; None if there are none. With ``validation.rollout`` they may lack an answer."""
    if not config.validation_sources:
        return None
    settings = replace(
        token_settings(config),
        domain_key=None,
        prompts_only=config.effective_validation.rollout is not None,
        reads_answers=True,
    )
    return _tokenized(config, tokenizer, validation_sources(config), settings, show, progress)


def token_settings(config: DistillConfig) -> TokenizeSettings:
    """How the configuration turns rows into tokens."""
    args = config.student.data_args
    return TokenizeSettings(
        template=args.template,
        template_kwargs=args.template_kwargs,
        default_system=args.default_system,
        prompt_file=args.prompt_file,
        train_on=args.train_on,
        question_key=config.question_key,
        answer_key=config.answer_key,
        prompt_key=config.prompt_key,
        system_key=config.system_key,
        weight_key=args.weight_key,
        domain_key=args.domain_key,
        sequence_length=config.sequence_length,
        overlong=args.overlong,
        reads_answers=config.needs_answers,
        on_bad_row=args.on_bad_row,
        distill_on_prompt=config.distill_on_prompt,
        prompts_only=not config.needs_answers,
        keep_columns=config.rollout is not None and config.rollout.environment is not None,
        teacher_prompt=_teacher_prompt(config),
        workers=args.preprocessing_num_workers,
    )


def _teacher_prompt(config: DistillConfig) -> TeacherPrompt | None:
    given = config.teacher.prompt
    if given is None:
        return None
    return TeacherPrompt(given.key, given.template, given.max_length or config.sequence_length)


def _longest_for_teacher(config: DistillConfig, examples: Examples) -> int:
    """Tokens of the longest row as the teacher reads it, with an answer that may be written yet."""
    if examples.teacher_prompt_ends is None:
        return int(examples.lengths.max())
    prompts = np.diff(examples.teacher_prompt_ends, prepend=0)
    longest = int((prompts + examples.lengths - answer_starts(examples)).max())
    if config.rollout is None:
        return longest
    written = config.rollout.max_new_tokens if config.rollout.max_turns == 1 else config.sequence_length
    return max(longest, int(prompts.max()) + min(written, config.sequence_length))


def mixture_settings(config: DistillConfig) -> MixtureSettings:
    """How the configuration mixes its sources."""
    args, entries = config.student.data_args, config.data_sources
    return MixtureSettings(
        weights=tuple(entry.weight for entry in entries),
        temperature=args.mixing_temperature,
        domain_probs=args.domain_interleave_probs,
        max_samples=tuple(entry.max_samples for entry in entries),
        num_samples=args.num_samples,
    )


def _tokenized(
    config: DistillConfig,
    tokenizer: Any,
    sources: list[Source],
    settings: TokenizeSettings,
    show: bool,
    progress: Progress | None,
) -> tuple[Examples, DataReport]:
    with row_counter(enabled=show) as counter:

        def report(rows: int) -> None:
            for receiver in (counter, progress):
                if receiver is not None:
                    receiver(rows)

        return tokenize_files(sources, tokenizer, cache_dir=cache_folder(config), progress=report, settings=settings)
