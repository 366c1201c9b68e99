"""A configuration turned into the objects of a run: models and objective. Data is in ``inputs``, the loop in ``distill``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from limbeck.config import DistillConfig
from limbeck.config.schema import WorkerConfig
from limbeck.errors import LimbeckError
from limbeck.models import (
    add_lora,
    use_eager_on_cpu,
    body,
    check_head,
    check_length,
    check_logit_layer,
    decoder_layers,
    freeze,
    hidden_states,
    enable_varlen_attention,
    load_model,
    output_head,
    recompute_activations,
    unwrap_model,
)
from limbeck.objectives import CrossTokenizer, Objective, TaidSchedule, VocabParallel, compiler_found
from limbeck.train.features import make_features
from limbeck.train.build.data import Data
from limbeck.strategies.optimizer import make_optimizer
from limbeck.train.reference_quirks import ReferenceQuirks
from limbeck.train.student import Outline, StudentStage, StudentWithLoss
from limbeck.strategies import deepspeed
from limbeck.strategies.context_parallel import apply_context_parallel
from limbeck.strategies.torch_engine import Engine, TorchEngine
from limbeck.strategies.fsdp2 import Fsdp2, make_mesh, shard
from limbeck.strategies.parallel_dims import TENSOR, Layout
from limbeck.strategies.pipeline_engine import PipelineEngine
from limbeck.strategies.pipeline_parallel import check_stages, keep_stage
from limbeck.strategies.tensor_parallel import apply_tensor_parallel, check_tensor_parallel, sum_partial_gradients
from limbeck.strategies.world import World
from limbeck.teachers import ModelParallelGroup, LocalTeacher, Teacher, ModelParallelTeacher, SignalSpec

M = TypeVar("M", bound=nn.Module)

_SIZES = "tensor_model_parallel_size, context_parallel_size or pipeline_model_parallel_size"
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
            raise LimbeckError(f"kd_objective_kwargs must be numbers for taid: {error}.") from error
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


def signal_spec(config: DistillConfig, vocab: int) -> SignalSpec:
    """What a teacher in other processes is asked for; ``vocab`` is the shared vocabulary."""
    return SignalSpec(config.teacher_signal, config.logits_topk, vocab, config.effective_teacher_temperature)


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
    """The student with its loss: float32 masters, spread over the ranks unless DeepSpeed will; frozen and LoRA as configured.

    The shared vocabulary is what the tokenizer and both output heads have in common: rows that pad a head do not count.
    """
    args = config.student.model_args
    dtype = DTYPES[args.dtype]
    refuse_layout(config, world.size, world.device.type)
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
    name, layout = str(args.model_name_or_path or "the student"), layout_of(config.student)
    check_tensor_parallel(body(model), layout, name, "student")
    check_stages(body(model), layout.pipeline, name, "student")
    _check_model(model, name, config, data)
    if config.features.logit_layers:
        check_logit_layer(model, config.features.logit_layers[0], "student")
    vocab = min(data.num_tokens, output_head(model).weight.shape[0])
    _check_tokens("student", min(vocab, model.get_input_embeddings().weight.shape[0]), data.largest_token)
    cross = None
    if teacher is not None and data.translator is not None:
        known = len(data.translator.teacher.bytes)  # rows that pad the head have no token
        cross = CrossTokenizer(
            data.translator.vocabularies(vocab, min(known, teacher.vocab_size)),
            config.cross_tokenizer,
            config.cross_tokenizer_rest_weight,
            config.cross_tokenizer_merge,
        )
    elif teacher is not None:
        vocab = min(vocab, teacher.vocab_size)
    compiled = compile_loss(config, data, total_steps, vocab)
    faults = ReferenceQuirks.of(config.objective_faults, int(data.tokenizer.vocab_size))
    return parallelize_student(
        config, world, model, objective, vocab, teacher, compiled=compiled, cross=cross, faults=faults
    )


def parallelize_student(
    config: DistillConfig,
    world: World,
    model: Any,
    objective: Objective,
    vocab: int,
    teacher: Teacher | None,
    *,
    compiled: bool,
    cross: CrossTokenizer | None = None,
    faults: ReferenceQuirks | None = None,
    proven: bool = True,
) -> StudentWithLoss:
    """A student's ``model``, loaded and checked, made into what is trained; ``proven``: see ``spread``."""
    args, layout = config.student.model_args, layout_of(config.student)
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
    features = make_features(config, model, teacher)
    options = fsdp2_options(config.student, DTYPES[args.dtype])
    rows = output_head(model).weight.shape[0]
    mesh = make_mesh(world, options, layout) if world.size > 1 else None
    outline, stages = Outline.of(model), layout.stages(world)
    name = str(args.model_name_or_path or "the student")
    partial_gradients = spread(model, layout, world, mesh, name, proven=proven)
    if stages is not None and world.max(not any(parameter.requires_grad for parameter in model.parameters())):
        raise LimbeckError(
            f"student.strategy_args.strategy_config.pipeline_model_parallel_size = {layout.pipeline}: freeze_module_prefix "
            "leaves one of the stages nothing to train; use fewer stages, or freeze less."
        )
    across, finish = None, lambda: None
    if mesh is not None and layout.tensor > 1:
        across = VocabParallel(vocab, mesh[TENSOR].get_group(), rows)
        finish = partial(sum_partial_gradients, partial_gradients, mesh[TENSOR])
    parts = (model, objective, vocab, features, config.loss_balance, compiled, cross, faults, across, finish)
    root = StudentWithLoss(*parts) if stages is None else StudentStage(*parts, stages=stages, outline=outline)
    root.train()
    if config.student.strategy_args.strategy_name == "deepspeed_train":
        return root
    # Sharding moves layer by layer, so no device ever holds the whole model; what is left over follows.
    return _on(world.device, shard(root, decoder_layers(model), world, options, mesh))


def make_engine(config: DistillConfig, world: World, student: StudentWithLoss) -> Engine:
    """What steps the student: PyTorch's optimizer, or DeepSpeed, which also spreads it."""
    training, strategy = config.student.training_args, config.student.strategy_args
    dtype = fsdp2_options(config.student, DTYPES[config.student.model_args.dtype]).param_dtype
    if strategy.strategy_name != "deepspeed_train":
        optimizer = make_optimizer(student, training)
        if isinstance(student, StudentStage):
            return PipelineEngine(
                student,
                optimizer,
                world,
                student.stages,
                dtype=dtype or torch.float32,
                max_norm=config.max_grad_norm,
                tied=student.outline.tied,
            )
        return TorchEngine(student, optimizer, world, compute_dtype=dtype, max_norm=config.max_grad_norm)
    block = strategy.strategy_config.deepspeed
    return deepspeed.ZeroEngine(
        student,
        make_optimizer(student, training, partial(deepspeed.make_adamw, block=block)),
        world,
        block,
        compute_dtype=dtype,
        max_norm=config.max_grad_norm,
        accumulates=training.gradient_accumulation_steps > 1 or config.student.use_dynamic_batching_in_train,
    )


def check_strategies(config: DistillConfig) -> None:
    """Raise LimbeckError, before anything is loaded, when a strategy's library is not installed."""
    names = (config.student.strategy_args.strategy_name, config.teacher.strategy_args.strategy_name)
    if any(name is not None and name.startswith("deepspeed") for name in names):
        deepspeed.start()


def refuse_layout(config: DistillConfig, ranks: int, device: str) -> None:
    """Raise LimbeckError for a student that does not train on so many ranks on such devices ("cpu" or "cuda")."""
    args = config.student.model_args
    if args.dtype == "fp16" and ranks > 1 and config.student.strategy_args.strategy_name != "deepspeed_train":
        raise LimbeckError(
            "student.model_args.dtype = fp16 trains on several ranks with deepspeed_train only; use that, or bf16."
        )
    if args.attn_implementation == "flex_attention" and device == "cpu":
        raise LimbeckError(
            "student.model_args.attn_implementation = flex_attention has no backward pass on a CPU; use sdpa or auto."
        )


def recompute(config: DistillConfig, world: World) -> bool:
    """Whether activations are computed again in the backward pass: unless told, on GPUs, where memory is what runs out."""
    disabled = config.student.model_args.disable_gradient_checkpointing
    return world.device.type == "cuda" if disabled is None else not disabled


def _check_model(model: Any, name: str, config: DistillConfig, data: Data) -> None:
    check_length(model, name, data.longest_row)
    check_head(model, name)
    if config.student.use_sequence_packing:
        enable_varlen_attention(model, name)


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
    name, layout = str(args.model_name_or_path), layout_of(config.teacher)
    layout.check(world, "teacher")
    check_tensor_parallel(body(model), layout, name, "teacher")
    check_stages(body(model), layout.pipeline, name, "teacher")
    check_head(model, name)
    if config.student.use_sequence_packing and config.cross_tokenizer == "off":
        enable_varlen_attention(model, name)
    return parallelize_teacher(config, world, model)


def parallelize_teacher(config: DistillConfig, world: World, model: Any, *, proven: bool = True) -> LocalTeacher:
    """A teacher's ``model``, loaded and checked, over the processes of ``world``; ``proven``: see ``spread``."""
    name, layout = str(config.teacher.model_args.model_name_or_path), layout_of(config.teacher)
    dtype = fsdp2_options(config.teacher, DTYPES[config.teacher.model_args.dtype]).param_dtype or torch.float32
    head = output_head(model)
    # The head is sent once: every rank keeps it whole, also when the body is spread.
    bias = None if head.bias is None else head.bias.detach().to(world.device)
    head = replace(head, weight=head.weight.detach().to(world.device), bias=bias)
    size = sum(parameter.numel() for parameter in model.parameters())
    trunk = body(model).requires_grad_(False)
    strategy = config.teacher.strategy_args
    if strategy.strategy_name == "deepspeed_infer":
        deepspeed.shard_frozen(trunk, world, strategy.strategy_config.deepspeed, dtype)
        return LocalTeacher(trunk, head, size)
    options = fsdp2_options(config.teacher, dtype)
    mesh = make_mesh(world, options, layout) if world.size > 1 else None
    spread(model, layout, world, mesh, name, proven=proven)
    if teacher_is_sharded(config, world):
        shard(trunk, decoder_layers(trunk), world, options, mesh)
    _on(world.device, trunk)
    group = layout.together_group(world)
    if group is None:
        return LocalTeacher(trunk, head, size)
    ranks = dist.get_process_group_ranks(group)
    owners = list(ranks[:: min(world.together, len(ranks))])
    mine = max(owner for owner in owners if owner <= world.rank)
    circle = ModelParallelGroup(group, layout.context_group(world), layout.stages(world), owners, mine)
    return ModelParallelTeacher(trunk, head, size, circle)


def layout_of(worker: WorkerConfig) -> Layout:
    """How many ranks hold one model together."""
    given = worker.strategy_args.strategy_config
    return Layout(
        given.tensor_model_parallel_size,
        given.context_parallel_size,
        given.pipeline_model_parallel_size,
        given.sequence_parallel,
    )


def resolve_parallelism(config: DistillConfig, world: World, *, teacher_here: bool = True) -> World:
    """``world`` as the student's layout divides it. Raises LimbeckError for what cannot run, before anything is loaded.

    teacher_here: the student's own processes hold the teacher.
    """
    student, teacher = layout_of(config.student), layout_of(config.teacher)
    student.check(world, "student")
    if config.has_teacher and teacher_here:
        teacher.check(world, "teacher")
        larger, smaller = max(student.together, teacher.together), min(student.together, teacher.together)
        if larger % smaller:
            raise LimbeckError(
                f"{student.together} ranks hold one student together and {teacher.together} one teacher (tensor_model_parallel_"
                "size × context_parallel_size × pipeline_model_parallel_size); one of these numbers must divide the other."
            )
        if config.features.pairs and larger > 1:
            raise LimbeckError(f"features.pairs with a {_SIZES} above 1 is not built yet; take one of them out.")
    key = "student.strategy_args.strategy_config"
    if config.cross_tokenizer != "off" and student.together > 1:
        raise LimbeckError(
            f"{key}: a {_SIZES} above 1 with cross_tokenizer is not built yet; set all to 1 (the teacher's may stay)."
        )
    for size, called in ((student.tensor, "tensor"), (student.pipeline, "pipeline")):
        if config.student.model_args.lora_target and size > 1:
            raise LimbeckError(
                f"{key}.{called}_model_parallel_size = {size} with lora_target is not built yet; use 1, and FSDP2 shards the "
                "model all the same."
            )
    if config.objective_faults and student.together > 1:
        raise LimbeckError(f"{key}: a {_SIZES} above 1 with objective_faults is not built; set all to 1.")
    return replace(world, tensor=student.tensor, context=student.context, pipeline=student.pipeline)


def spread(
    model: Any, layout: Layout, world: World, mesh: DeviceMesh | None, name: str, *, proven: bool = True
) -> list[nn.Module]:
    """``model`` divided into stages, sliced over tensor ranks and its rows over context ranks in place, and proven to give
    what it gave before.

    Returns the modules that have a part of their gradient on every tensor rank. ``proven``: False where there are no numbers.
    """
    if layout.together == 1 or mesh is None:
        return []
    stages = layout.stages(world)
    if not proven:
        if stages is not None:
            keep_stage(unwrap_model(model), body(model), stages.number, stages.count)
        return _slice(model, layout, world, mesh, name)
    trunk, was_training = body(model).eval(), model.training
    time = 4 * layout.context
    ids = torch.arange(1, 1 + time).unsqueeze(0) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        if stages is None:
            model.to(world.device)
        with use_eager_on_cpu(unwrap_model(model), model.device):
            before = hidden_states(trunk, ids.to(model.device), None).to(world.device)
        if stages is not None:  # no device ever holds all of them
            keep_stage(unwrap_model(model), trunk, stages.number, stages.count)
            model.to(world.device)
        ids = ids.to(world.device)
        partial_gradients = _slice(model, layout, world, mesh, name)
        rank = world.rank // layout.tensor % layout.context
        here = slice(4 * rank, 4 * rank + 4) if layout.context > 1 else slice(None)
        positions = torch.arange(time, device=world.device).unsqueeze(0)
        embedded = None
        if stages is not None and not stages.is_first:
            embedded = stages.receive(torch.empty_like(before[:, here]))
        after = hidden_states(trunk, ids[:, here], positions[:, here], None, embedded)
        if stages is not None and not stages.is_last:
            stages.send_on(after)
            after = before[:, here]  # which the last stage can judge alone
    model.train(was_training)
    worst = world.max((after - before[:, here]).abs().max().float().item())
    coarse = before.dtype in (torch.bfloat16, torch.float16)
    if not worst <= (0.1 if coarse else 1e-3) * before.abs().max().item():
        raise LimbeckError(
            f"{name} ({type(trunk).__name__}) does not give the same with tensor_model_parallel_size = {layout.tensor}, "
            f"context_parallel_size = {layout.context} and pipeline_model_parallel_size = {layout.pipeline} (its hidden states "
            f"differ by up to {worst:.3g}); set all to 1, and FSDP2 shards it all the same."
        )
    return partial_gradients


def _slice(model: Any, layout: Layout, world: World, mesh: DeviceMesh, name: str) -> list[nn.Module]:
    trunk = body(model)
    partial_gradients: list[nn.Module] = []
    with torch.no_grad():
        if layout.tensor > 1:
            layers, sequence = decoder_layers(trunk), layout.sequence
            partial_gradients = apply_tensor_parallel(unwrap_model(model), trunk, layers, mesh[TENSOR], sequence=sequence)
        group = layout.context_group(world)
        if group is not None:
            apply_context_parallel(unwrap_model(model), trunk, group, name)
    return partial_gradients


def _on(device: torch.device, module: M) -> M:
    # Where it was loaded nothing is to move, and a plan's parameters cannot.
    return module if device.type == "cpu" else module.to(device)


def teacher_is_sharded(config: DistillConfig, world: World) -> bool:
    """Whether the teacher's ranks share its parameters, and so run every forward pass together."""
    return world.size > 1 and config.teacher.strategy_args.strategy_name != "hf_infer"


def check_teacher(teacher: LocalTeacher, config: DistillConfig, longest_row: int, largest_token: int) -> None:
    """Raise LimbeckError unless the teacher has a position for every token of the longest row and knows every token."""
    check_length(teacher.body, str(config.teacher.model_args.model_name_or_path), longest_row)
    # Not the weight's rows, which are elsewhere where ZeRO-3 shards it.
    known = min(teacher.vocab_size, teacher.body.get_input_embeddings().num_embeddings)  # type: ignore
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
