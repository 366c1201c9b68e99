"""A configuration turned into the objects of a run: data, models, objective. The loop is not here."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from limbeck.config import DistillConfig
from limbeck.config.schema import WorkerConfig
from limbeck.data import (
    BatchStream,
    DataReport,
    Examples,
    GlobalBatch,
    MixtureSettings,
    Source,
    check_same_tokenizer,
    fixed_batches,
    mix,
    tokenize_files,
)
from limbeck.errors import LimbeckError
from limbeck.models import (
    add_lora,
    body,
    check_head,
    check_length,
    check_packing,
    decoder_layers,
    freeze,
    load_model,
    load_tokenizer,
    output_head,
    recompute_activations,
)
from limbeck.objectives import Objective
from limbeck.pipeline.console import row_counter
from limbeck.pipeline.student import StudentWithLoss
from limbeck.strategies.fsdp2 import Fsdp2, shard
from limbeck.strategies.world import World
from limbeck.teachers import LocalTeacher

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Data:
    """Tokenizer, training stream and validation batches of one rank, with the reports of what became of the rows.

    largest_token: the highest token id that occurs; longest_row: in tokens; num_tokens: ids that the tokenizer has.
    """

    tokenizer: Any
    stream: BatchStream
    validation: list[GlobalBatch]
    report: str
    largest_token: int
    longest_row: int
    num_tokens: int


def cache_folder(config: DistillConfig) -> Path:
    """Where tokenised data is kept: ``cache_path``, else LIMBECK_CACHE, else the user's cache folder."""
    given = config.student.data_args.cache_path or os.environ.get("LIMBECK_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "limbeck" / "tokens"


def make_data(config: DistillConfig, world: World) -> Data:
    """Read, check and tokenise everything before anything is trained."""
    model, training = config.student.model_args, config.student.training_args
    source = str(config.tokenizer_name_or_path)
    revision = model.revision if source == model.model_name_or_path else None
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=model.trust_remote_code)
    if config.has_teacher:
        _check_tokenizers(tokenizer, config.teacher)

    if not world.is_main:
        world.wait()  # the main process fills the cache, the others read it
    train, report = prepare_examples(config, tokenizer, show=world.is_main)
    held_out = prepare_validation(config, tokenizer, show=world.is_main)
    if world.is_main:
        world.wait()
    mixture = mix(train, report, mixture_settings(config), config.data_seed)
    text = f"training: {report}" + (f"\nmixture: {mixture}" if mixture else "")
    chosen: dict[str, Any] = {"rows_of_epoch": mixture.rows_of_epoch} if mixture else {}
    stream = BatchStream(
        train,
        seed=config.data_seed,
        sequence_length=config.sequence_length,
        per_device_batch_size=training.per_device_train_batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        rank=world.rank,
        world_size=world.size,
        packing=config.student.use_sequence_packing,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        length_round=config.student.sequence_length_round_in_train,
        pad_id=tokenizer.pad_token_id,
        **chosen,
    )
    validation: list[GlobalBatch] = []
    largest, longest = report.largest_token, int(train.lengths.max())
    if held_out is not None:
        validation = fixed_batches(
            held_out[0],
            batch_size=config.student.infer_batch_size,
            rank=world.rank,
            world_size=world.size,
            pad_id=tokenizer.pad_token_id,
            length_round=config.student.sequence_length_round_in_train,
        )
        text += f"\nvalidation: {held_out[1]}"
        largest = max(largest, held_out[1].largest_token)
        longest = max(longest, int(held_out[0].lengths.max()))
    return Data(tokenizer, stream, validation, text, largest, longest, max(tokenizer.get_vocab().values()) + 1)


def prepare_examples(config: DistillConfig, tokenizer: Any, *, show: bool = True) -> tuple[Examples, DataReport]:
    """The training rows as tokens, from the cache or into it; with ``show`` a person at a terminal sees the progress.

    Raises LimbeckError for anything wrong with any row, unless ``on_bad_row`` is ``skip``.
    """
    args = config.student.data_args
    sources = [
        Source(
            path=tuple(entry.path or ()),
            hub=entry.hub,
            config=entry.config,
            split=entry.split,
            revision=entry.revision,
            format=entry.format or args.format,
            domain=entry.domain,
        )
        for entry in config.data_sources
    ]
    return _tokenized(config, tokenizer, sources, args.domain_key, show)


def prepare_validation(
    config: DistillConfig, tokenizer: Any, *, show: bool = True
) -> tuple[Examples, DataReport] | None:
    """The same for the rows that the student is measured on; None if none are named."""
    if not config.validation_files:
        return None
    named = [Source.named(name) for name in config.validation_files]
    return _tokenized(
        config, tokenizer, [replace(one, format=config.student.data_args.format) for one in named], None, show
    )


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
    config: DistillConfig, tokenizer: Any, sources: list[Source], domain_key: str | None, show: bool
) -> tuple[Examples, DataReport]:
    args = config.student.data_args
    with row_counter(enabled=show) as progress:
        return tokenize_files(
            sources,
            tokenizer,
            cache_dir=cache_folder(config),
            progress=progress,
            template=args.template,
            template_kwargs=args.template_kwargs,
            question_key=config.question_key,
            answer_key=config.answer_key,
            prompt_key=config.prompt_key,
            system_key=config.system_key,
            weight_key=args.weight_key,
            domain_key=domain_key,
            sequence_length=config.sequence_length,
            overlong=args.overlong,
            on_bad_row=args.on_bad_row,
            distill_on_prompt=config.distill_on_prompt,
            workers=args.preprocessing_num_workers,
        )


def _check_tokenizers(student: Any, teacher: WorkerConfig) -> None:
    args = teacher.model_args
    name = str(args.model_name_or_path)
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return  # a bare model folder speaks the student's tokens by the user's word
    check_same_tokenizer(
        student, load_tokenizer(name, revision=args.revision, trust_remote_code=args.trust_remote_code)
    )


def make_objective(config: DistillConfig) -> Objective:
    """The objective in numbers."""
    parameters: dict[str, float] = {}
    if config.kd_objective == "adaptive_kl":
        parameters["alpha"] = config.adaptive_kl_alpha
    elif config.kd_objective in ("skewed_forward_kl", "skewed_reverse_kl"):
        parameters["skew"] = config.skew_lambda
    elif config.kd_objective == "js_divergence":
        parameters["beta"] = config.js_beta
    return Objective.of(
        config.kd_objective,
        kd_weight=config.distill_loss_weight,
        temperature=config.kd_temperature,
        teacher_temperature=config.effective_teacher_temperature,
        squared=config.temperature_squared,
        topk=config.logits_topk,
        parameters=parameters,
    )


def make_student(config: DistillConfig, world: World, data: Data, teacher: LocalTeacher | None) -> StudentWithLoss:
    """The student with its loss: float32 masters, spread over the ranks; frozen and LoRA parts as configured.

    The shared vocabulary is what the tokenizer and both output heads have in common: rows that pad a head do not count.
    """
    args = config.student.model_args
    dtype = DTYPES[args.dtype]
    if dtype is torch.float16 and world.size > 1:
        raise LimbeckError("student.model_args.dtype = fp16 does not train on several ranks here; use bf16.")
    # Optimizer steps are too small for half precision, so what is trained is kept in float32; a LoRA base is not trained.
    model = load_model(
        args.model_name_or_path,
        dtype=dtype if args.lora_target else torch.float32,
        attn_implementation=args.attn_implementation,
        from_scratch=args.from_scratch,
        config_kwargs=args.model_config_kwargs,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        seed=config.seed,
        role="student",
    )
    _check_model(model, str(args.model_name_or_path or "the student"), config, data)
    vocab = min(data.num_tokens, output_head(model).weight.shape[0])
    _check_tokens("student", min(vocab, model.get_input_embeddings().weight.shape[0]), data)
    if teacher is not None:
        vocab = min(vocab, teacher.head.weight.shape[0])
    if args.lora_target:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = add_lora(
                model,
                target=args.lora_target,
                rank=args.lora_rank,
                alpha=args.lora_alpha,
                dropout=args.lora_dropout,
                additional_target=args.additional_target,
            )
    if args.freeze_module_prefix and args.lora_target:
        raise LimbeckError(
            "student.model_args.freeze_module_prefix and lora_target contradict: LoRA freezes everything but its adapters; "
            "give only one."
        )
    if args.freeze_module_prefix:
        freeze(model, [prefix.strip() for prefix in args.freeze_module_prefix.split(",")])
    if recompute(config, world):
        recompute_activations(model, use_reentrant=bool(args.gradient_checkpointing_use_reentrant))
        if args.lora_target:
            model.enable_input_require_grads()
    root = StudentWithLoss(model, make_objective(config), vocab).train()
    # Sharding moves layer by layer, so no device ever holds the whole model; what is left over follows.
    return shard(root, decoder_layers(model), world, fsdp2_options(config.student, dtype)).to(world.device)


def recompute(config: DistillConfig, world: World) -> bool:
    """Whether activations are computed again in the backward pass: unless told, on GPUs, where memory is what runs out."""
    disabled = config.student.model_args.disable_gradient_checkpointing
    return world.device.type == "cuda" if disabled is None else not disabled


def _check_model(model: Any, name: str, config: DistillConfig, data: Data) -> None:
    check_length(model, name, data.longest_row)
    check_head(model, name)
    if config.student.use_sequence_packing:
        check_packing(model, name)


def _check_tokens(role: str, known: int, data: Data) -> None:
    if data.largest_token >= known:
        raise LimbeckError(
            f"the data holds token id {data.largest_token}, but the {role} knows only {known} tokens; "
            "use the tokenizer that both models were trained with, or resize the model's embeddings first."
        )


def make_teacher(config: DistillConfig, world: World, data: Data) -> LocalTeacher | None:
    """The frozen teacher, or None when nothing is distilled."""
    args = config.teacher.model_args
    if not config.has_teacher:
        return None
    dtype = fsdp2_options(config.teacher, DTYPES[args.dtype]).param_dtype or torch.float32
    model = load_model(
        args.model_name_or_path,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        from_scratch=args.from_scratch,
        config_kwargs=args.model_config_kwargs,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        seed=config.seed,
        role="teacher",
    )
    _check_model(model, str(args.model_name_or_path), config, data)
    head = output_head(model)
    _check_tokens("teacher", min(head.weight.shape[0], model.get_input_embeddings().weight.shape[0]), data)
    # The head is sent once: every rank keeps it whole, also when the body is spread.
    bias = None if head.bias is None else head.bias.detach().to(world.device)
    head = replace(head, weight=head.weight.detach().to(world.device), bias=bias)
    size = sum(parameter.numel() for parameter in model.parameters())
    trunk = body(model).requires_grad_(False)
    if config.teacher.strategy_args.strategy_name != "hf_infer":
        shard(trunk, decoder_layers(trunk), world, fsdp2_options(config.teacher, dtype))
    return LocalTeacher(trunk.to(world.device), head, size)


def fsdp2_options(worker: WorkerConfig, dtype: torch.dtype) -> Fsdp2:
    """The strategy's settings as FSDP2 wants them."""
    given = worker.strategy_args.strategy_config
    computed = DTYPES[given.param_dtype] if given.param_dtype else dtype
    return Fsdp2(
        fsdp_size=given.fsdp_size or 0,
        replicate=given.replicate,
        param_dtype=None if computed is torch.float32 else computed,
        reduce_dtype=DTYPES[given.reduce_dtype],
        reshard_after_forward=True if given.reshard_after_forward is None else given.reshard_after_forward,
    )
