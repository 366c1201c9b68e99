"""A configuration turned into the objects of a run: models and objective. Data is in ``inputs``, the loop in ``distill``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from limbeck.config import DistillConfig
from limbeck.config.schema import WorkerConfig
from limbeck.errors import LimbeckError
from limbeck.models import (
    add_lora,
    body,
    check_head,
    check_length,
    check_logit_layer,
    decoder_layers,
    freeze,
    keep_documents_apart,
    load_model,
    output_head,
    recompute_activations,
)
from limbeck.objectives import CrossTokenizer, Objective, TaidSchedule, compiler_found
from limbeck.pipeline.features import make_features
from limbeck.pipeline.inputs import Data
from limbeck.pipeline.parity import Faults
from limbeck.pipeline.student import StudentWithLoss
from limbeck.strategies.fsdp2 import Fsdp2, shard
from limbeck.strategies.world import World
from limbeck.teachers import LocalTeacher, Teacher

_REPAYS_COMPILING = 1 << 32  # logits in a run; compiling saves some 5 ns on each and costs some 10 s
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_objective(config: DistillConfig, device: torch.device) -> tuple[Objective, TaidSchedule | None]:
    """The objective in numbers, and the schedule that moves it if it is TAID."""
    parameters: dict[str, Any] = dict(config.kd_objective_kwargs)
    schedule = None
    if config.kd_objective == "taid":
        try:
            schedule = TaidSchedule(**parameters, device=device)
        except TypeError as error:
            raise LimbeckError(f"kd_objective_kwargs does not fit taid: {error}.") from error
        parameters = {"t": schedule.t}
    elif config.kd_objective == "adaptive_kl":
        parameters["alpha"] = config.adaptive_kl_alpha
    elif config.kd_objective in ("skewed_forward_kl", "skewed_reverse_kl"):
        parameters["skew"] = config.skew_lambda
    elif config.kd_objective == "js_divergence":
        parameters["beta"] = config.js_beta
    objective = Objective.of(
        config.kd_objective,
        kd_weight=config.distill_loss_weight,
        temperature=config.kd_temperature,
        teacher_temperature=config.effective_teacher_temperature,
        squared=config.temperature_squared,
        topk=config.logits_topk,
        tail=config.logits_topk_tail,
        parameters=parameters,
    )
    return objective, schedule


def compile_loss(config: DistillConfig, data: Data, total_steps: int, vocab: int) -> bool:
    """Whether to compile the loss: a function of the configuration and the data alone, so that a resumed run does the same."""
    if config.compile_loss == "auto":
        logits = data.supervised_tokens / data.stream.steps_per_epoch * total_steps * vocab
        return logits >= _REPAYS_COMPILING and compiler_found()
    return config.compile_loss


def make_student(
    config: DistillConfig,
    world: World,
    data: Data,
    teacher: Teacher | None,
    objective: Objective,
    total_steps: int,
) -> StudentWithLoss:
    """The student with its loss: float32 masters, spread over the ranks; frozen and LoRA parts as configured.

    The shared vocabulary is what the tokenizer and both output heads have in common: rows that pad a head do not count.
    """
    args = config.student.model_args
    dtype = DTYPES[args.dtype]
    if dtype is torch.float16 and world.size > 1:
        raise LimbeckError("student.model_args.dtype = fp16 does not train on several ranks here; use bf16.")
    if args.attn_implementation == "flex_attention" and world.device.type == "cpu":
        raise LimbeckError(
            "student.model_args.attn_implementation = flex_attention has no backward pass on a CPU; use sdpa or auto."
        )
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
    if config.features.logit_layers:
        check_logit_layer(model, config.features.logit_layers[0], "student")
    vocab = min(data.num_tokens, output_head(model).weight.shape[0])
    _check_tokens("student", min(vocab, model.get_input_embeddings().weight.shape[0]), data.largest_token)
    cross = None
    if teacher is not None and data.translator is not None:
        known = len(data.translator.teacher.bytes)  # rows that pad the head have no token
        cross = CrossTokenizer(
            data.translator.vocabularies(vocab, min(known, teacher.head.weight.shape[0])),
            config.cross_tokenizer,
            config.cross_tokenizer_rest_weight,
            config.cross_tokenizer_merge,
        )
    elif teacher is not None:
        vocab = min(vocab, teacher.head.weight.shape[0])
    model = adapt(config, model, recomputed=recompute(config, world))
    compiled = compile_loss(config, data, total_steps, vocab)
    features = make_features(config, model, teacher)
    faults = Faults.of(config.objective_faults, int(data.tokenizer.vocab_size))
    root = StudentWithLoss(model, objective, vocab, features, config.loss_balance, compiled, cross, faults).train()
    # Sharding moves layer by layer, so no device ever holds the whole model; what is left over follows.
    return shard(root, decoder_layers(model), world, fsdp2_options(config.student, dtype)).to(world.device)


def adapt(config: DistillConfig, model: Any, *, recomputed: bool) -> Any:
    """The student's model with its adapters, its frozen parts, and activations ``recomputed`` or kept."""
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
    if args.freeze_module_prefix and args.lora_target:
        raise LimbeckError(
            "student.model_args.freeze_module_prefix and lora_target contradict: LoRA freezes everything but its adapters; "
            "give only one."
        )
    if args.freeze_module_prefix:
        freeze(model, [prefix.strip() for prefix in args.freeze_module_prefix.split(",")])
    if recomputed:
        recompute_activations(model, use_reentrant=bool(args.gradient_checkpointing_use_reentrant))
        if args.lora_target:
            model.enable_input_require_grads()
    return model


def recompute(config: DistillConfig, world: World) -> bool:
    """Whether activations are computed again in the backward pass: unless told, on GPUs, where memory is what runs out."""
    disabled = config.student.model_args.disable_gradient_checkpointing
    return world.device.type == "cuda" if disabled is None else not disabled


def _check_model(model: Any, name: str, config: DistillConfig, data: Data) -> None:
    check_length(model, name, data.longest_row)
    check_head(model, name)
    if config.student.use_sequence_packing:
        keep_documents_apart(model, name)


def _check_tokens(role: str, known: int, largest_token: int) -> None:
    if largest_token >= known:
        raise LimbeckError(
            f"the data holds token id {largest_token}, but the {role} knows only {known} tokens; "
            "use the tokenizer that both models were trained with, or resize the model's embeddings first."
        )


def make_teacher(config: DistillConfig, world: World) -> LocalTeacher:
    """The frozen teacher, spread over the processes of ``world``."""
    args = config.teacher.model_args
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
    if config.features.logit_layers:
        check_logit_layer(model, config.features.logit_layers[1], "teacher")
    check_head(model, str(args.model_name_or_path))
    if config.student.use_sequence_packing and config.cross_tokenizer == "off":
        keep_documents_apart(model, str(args.model_name_or_path))
    return spread_teacher(config, model, world)


def spread_teacher(config: DistillConfig, model: Any, world: World) -> LocalTeacher:
    """The teacher's model over the ranks, as its strategy says."""
    head, dtype = output_head(model), DTYPES[config.teacher.model_args.dtype]
    # The head is sent once: every rank keeps it whole, also when the body is spread.
    bias = None if head.bias is None else head.bias.detach().to(world.device)
    head = replace(head, weight=head.weight.detach().to(world.device), bias=bias)
    size = sum(parameter.numel() for parameter in model.parameters())
    trunk = body(model).requires_grad_(False)
    if teacher_is_sharded(config, world):
        shard(trunk, decoder_layers(trunk), world, fsdp2_options(config.teacher, dtype))
    if world.device.type != "cpu":  # where models are loaded
        trunk.to(world.device)
    return LocalTeacher(trunk, head, size)


def teacher_is_sharded(config: DistillConfig, world: World) -> bool:
    """Whether the teacher's ranks share its parameters, and so run every forward pass together."""
    return world.size > 1 and config.teacher.strategy_args.strategy_name != "hf_infer"


def check_teacher(teacher: LocalTeacher, config: DistillConfig, longest_row: int, largest_token: int) -> None:
    """Raise LimbeckError unless the teacher has a position for every token of the longest row and knows every token."""
    if config.cross_tokenizer == "off":  # otherwise the translator keeps to what the teacher's configuration says
        check_length(teacher.body, str(config.teacher.model_args.model_name_or_path), longest_row)
        known = min(teacher.head.weight.shape[0], teacher.body.get_input_embeddings().weight.shape[0])  # type: ignore
        _check_tokens("teacher", known, largest_token)


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
