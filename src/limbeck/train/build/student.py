"""Builds the student of a run: loads and checks the model, adds adapters, and gives it to its strategy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError
from limbeck.models import (
    ModelSource,
    add_lora,
    body,
    check_head,
    check_length,
    check_logit_layer,
    decoder_layers,
    enable_varlen_attention,
    freeze,
    has_lora,
    iter_merged,
    load_model,
    output_head,
    recompute_activations,
    recomputes_activations,
    select_trained,
    should_compile,
    undo_around,
)
from limbeck.models.dtypes import student_load_dtype
from limbeck.models.megatron_checkpoint import arguments_of
from limbeck.objectives import CrossTokenizer, VocabParallel
from limbeck.strategies.base import Capture, Engine, Placement, StudentSpec, dims_of, strategy_of
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.world import World
from limbeck.teachers.local import check_tokens
from limbeck.teachers.protocol import Teacher
from limbeck.train.build.data import Data
from limbeck.train.build.objective import compile_loss
from limbeck.train.features import Features, make_features
from limbeck.train.reference_quirks import ReferenceQuirks
from limbeck.train.step_source import Weights
from limbeck.train.student import EarlierLayers, LossSettings, StudentStage, StudentWithLoss

_SIZES = "tensor_model_parallel_size, context_parallel_size or pipeline_model_parallel_size"


@dataclass(frozen=True)
class Student:
    """A student in its engine.

    model: the Hugging Face model, for its configuration and for saving; on several ranks a part of it. num_parameters:
    of the whole model without feature projections.
    """

    engine: Engine
    model: Any
    settings: LossSettings
    num_parameters: int

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """``Engine.iter_weights`` of the plain model: adapters are merged. Collective."""
        weights = self.engine.iter_weights()
        return iter_merged(self.model, weights) if has_lora(self.model) else weights

    @property
    def weights(self) -> Weights:
        """The current weights, for step sources."""
        return Weights(self.iter_weights, self.engine)


def build_student(
    config: DistillConfig, world: World, data: Data, teacher: Teacher | None, settings: LossSettings, epochs: float
) -> Student:
    """Load the student and distribute it over ``world``.

    The shared vocabulary is what the tokenizer and both output heads have in common: rows that pad a head are not part
    of the loss.

    Args:
        settings: of the loss, without what depends on the models (vocabulary, features, another tokenizer).
        epochs: of the whole run; with the tokens of an epoch they decide what is compiled.
    """
    worker, args = config.student, config.student.model_args
    source = ModelSource.from_args(args, "student")
    strategy = strategy_of(worker, "student")
    model = load_model(source, student_load_dtype(args), config.seed)
    strategy.check_model(model, world.dims, source.name, "student")
    check_length(model, source.name, data.longest_row)
    check_head(model, source.name)
    if config.checkpoint_config.save_megatron:
        arguments_of(model.config)  # raises for a model that could not be written at the end
    if worker.use_sequence_packing:
        enable_varlen_attention(model, source.name)
    if config.features.logit_layers:
        check_logit_layer(model, config.features.logit_layers[0], "student")
    vocab = min(data.num_tokens, output_head(model).weight.shape[0])
    check_tokens("student", min(vocab, model.get_input_embeddings().weight.shape[0]), data.largest_token)
    cross = None
    if teacher is not None and data.translator is not None:
        known = len(data.translator.teacher.bytes)  # rows that pad the head have no token
        cross = CrossTokenizer(
            data.translator.vocabularies(vocab, min(known, teacher.info.vocab_size)),
            config.cross_tokenizer,
            config.cross_tokenizer_rest_weight,
            config.cross_tokenizer_merge,
        )
    elif teacher is not None:
        vocab = min(vocab, teacher.info.vocab_size)
    settings = replace(
        settings,
        vocab_size=vocab,
        compiled=compile_loss(config, data.supervised_tokens * epochs, vocab),
        cross=cross,
        quirks=ReferenceQuirks.from_names(config.objective_faults, int(data.tokenizer.vocab_size)),
    )
    flops = 6 * sum(parameter.numel() for parameter in model.parameters()) * data.tokens * epochs / world.size
    compiled = should_compile(config.compile_model, flops, world.device.type)
    return distribute_student(config, world, model, teacher, settings, compiled=compiled)


def distribute_student(
    config: DistillConfig,
    world: World,
    model: Any,
    teacher: Teacher | None,
    settings: LossSettings,
    *,
    verify: bool = True,
    compiled: bool = False,
) -> Student:
    """A loaded and checked ``model`` with adapters, frozen parts and features, distributed by its strategy.

    verify, compiled: see ``StudentSpec``.
    """
    args = config.student.model_args
    model = prepare_student(config, model)
    size = sum(parameter.numel() for parameter in model.parameters())
    if recomputes_activations(config, world.device.type):
        recompute_activations(model, use_reentrant=bool(args.gradient_checkpointing_use_reentrant))
        if args.lora_target:
            model.enable_input_require_grads()
    settings = replace(settings, features=make_features(config, model, teacher), balance=config.loss_balance)

    def features_on(capture: Capture, *, last: bool) -> Features | None:
        """The pairs of one part of the model. Every rank calls it for each of its parts; ``settings`` change on all at once."""
        nonlocal settings
        features = settings.features
        if features is None:
            return None
        found = features.on(capture(features.taps.names))
        if world.max(found is not None and not last) and settings.balance == "modelopt":
            _adapt(
                "loss_balance",
                "loss_balance = modelopt compares the size of all terms on the last pipeline stage, and features.pairs names "
                "layers of an earlier one",
                "name later layers, or set loss_balance: weighted",
                config,
                world,
            )
            settings = replace(settings, balance="weighted")
        if world.max(found is not None and found.is_divided and features.losses.shares_projection):
            _adapt(
                "projection",
                "features.projection = shared is not built for features.pairs on several pipeline stages",
                "set features.projection: per_pair, or pair layers of one stage",
                config,
                world,
            )
            settings = replace(settings, features=features.per_pair())
            return features_on(capture, last=last)
        return found

    def make_term(capture: Capture) -> nn.Module | None:
        found = features_on(capture, last=False)
        return None if found is None else EarlierLayers(found)

    def make_root(placement: Placement) -> nn.Module:
        parallel, own = None, settings
        if placement.capture is not None:
            features = features_on(placement.capture, last=True)  # first, because it may change settings
            own = replace(settings, features=features)
        if placement.vocab_group is not None:
            parallel = VocabParallel(settings.vocab_size, placement.vocab_group, placement.head_rows)
        if placement.pipeline is None:
            return StudentWithLoss(model, own, parallel)
        return StudentStage(model, own, placement.pipeline, parallel)

    name = str(args.model_name_or_path or "the student")
    spec = StudentSpec(model, name, config, make_root, make_term, verify, compiled)
    engine = strategy_of(config.student, "student").build_student(spec, world)
    if settings.features is not None:
        undo_around(decoder_layers(body(model)), settings.features.taps.modules)
    return Student(engine, model, settings, size)


def _adapt(key: str, fault: str, remedy: str, config: DistillConfig, world: World) -> None:
    """Raise LimbeckError for a setting that pipeline stages do not allow, or warn if ``adapt_to_stages`` has it."""
    if key not in config.features.adapt_to_stages:
        raise LimbeckError(f"{fault}; {remedy}.")
    if world.is_main:
        instead = {"loss_balance": "weighted", "projection": "per_pair"}[key]
        warnings.warn(f"{fault}, so {instead} is used, as features.adapt_to_stages allows.", stacklevel=2)


def prepare_student(config: DistillConfig, model: Any) -> Any:
    """``model`` with LoRA adapters or frozen parameters, as configured."""
    args = config.student.model_args
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
    if args.freeze_module_prefix:
        freeze(model, [prefix.strip() for prefix in args.freeze_module_prefix.split(",")])
    if args.unfrozen_parameters is not None or args.frozen_parameters is not None:
        select_trained(model, args.unfrozen_parameters, args.frozen_parameters, args.parameter_match)
    return model


def with_recomputation(config: DistillConfig, *, recompute: bool) -> DistillConfig:
    """``config`` with activation checkpointing switched on or off."""
    args = config.student.model_args.model_copy(update={"disable_gradient_checkpointing": not recompute})
    return config.model_copy(update={"student": config.student.model_copy(update={"model_args": args})})


def resolve_parallelism(
    config: DistillConfig, world: World, *, teacher_here: bool = True, device_type: str | None = None
) -> World:
    """``world`` with the student's dimensions.

    Args:
        teacher_here: the student's own processes hold the teacher.
        device_type: of the devices that the run will use; by default the world's.

    Raises:
        LimbeckError: for what cannot run, before anything is loaded.
    """
    device_type = device_type or world.device.type
    dims = dims_of(config.student, world.size, "student")
    strategy_of(config.student, "student").check(config, dims, "student", device_type)
    if config.has_teacher and teacher_here:
        _check_colocated(config, dims, dims_of(config.teacher, world.size, "teacher"))
    key = "student.strategy_args.strategy_config"
    if config.cross_tokenizer != "off" and dims.model_parallel_size > 1:
        raise LimbeckError(
            f"{key}: a {_SIZES} above 1 with cross_tokenizer is not built yet; set all to 1 (the teacher's may stay)."
        )
    if config.objective_faults and dims.model_parallel_size > 1:
        raise LimbeckError(f"{key}: a {_SIZES} above 1 with objective_faults is not built; set all to 1.")
    if config.student.model_args.attn_implementation == "flex_attention" and device_type == "cpu":
        raise LimbeckError(
            "student.model_args.attn_implementation = flex_attention has no backward pass on a CPU; use sdpa or auto."
        )
    return replace(world, dims=dims)


def _check_colocated(config: DistillConfig, student: ParallelDims, teacher: ParallelDims) -> None:
    larger, smaller = (pick(student.model_parallel_size, teacher.model_parallel_size) for pick in (max, min))
    if larger % smaller:
        raise LimbeckError(
            f"{student.model_parallel_size} ranks hold one student and {teacher.model_parallel_size} one teacher "
            "(tensor_model_parallel_size × context_parallel_size × pipeline_model_parallel_size); one of these numbers must "
            "divide the other."
        )
