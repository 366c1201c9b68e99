"""Builds and checks models on megatron-core. Registered as ``megatron_train`` and ``megatron_infer``.

A model is loaded as any other, as a Hugging Face model on the CPU of every rank. Megatron's GPTModel is built beside it
for this rank's layers and slices, takes its weights and then its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.config.schema import MegatronConfig, WorkerConfig
from limbeck.errors import LimbeckError
from limbeck.models import body, hidden_states, recomputes_activations, submodules, unwrap_model
from limbeck.models.dtypes import compute_dtype
from limbeck.models.megatron_families import padded_rows
from limbeck.strategies.base import Engine, FrozenModel, Placement, StudentSpec, TeacherSpec
from limbeck.strategies.fsdp2 import freeze_for_inference
from limbeck.strategies.megatron.body import MegatronBody, build_gpt_chunks, replace_body, wrap_body
from limbeck.strategies.megatron.capture import capture_in, recompute_layers
from limbeck.strategies.megatron.check import check_family, warn_of_unread_keys
from limbeck.strategies.megatron.core import ProcessGroups, import_megatron, is_divided_expert
from limbeck.strategies.megatron.engine import Chunk, MegatronEngine
from limbeck.strategies.megatron.transformer_engine import check_transformer_engine
from limbeck.strategies.megatron.weights import WeightMap
from limbeck.strategies.model_parallel import example, hidden_before, model_parallel_group, outline_of, pipeline_of
from limbeck.strategies.parallel_dims import TP, ParallelDims
from limbeck.strategies.pipeline_parallel import PipelineGroup
from limbeck.strategies.world import World


class MegatronStrategy:
    """Megatron's tensor, sequence, pipeline and data parallelism, and Ulysses for context parallelism."""

    def dims(self, worker: WorkerConfig, ranks: int, role: str) -> ParallelDims:
        return ParallelDims.from_config(worker.strategy_args.strategy_config, ranks, role, shard=False)

    def check(self, config: DistillConfig, dims: ParallelDims, role: str, device_type: str) -> None:
        import_megatron()
        worker: WorkerConfig = config.student if role == "student" else config.teacher
        given = worker.strategy_args.strategy_config.megatron
        virtual = given.virtual_pipeline_model_parallel_size
        lora = role == "student" and config.student.model_args.lora_target is not None
        name = config.student.training_args.optimizer_name
        refused = {
            f"student.training_args.optimizer_name = {name}": role == "student" and name != "adamw",
            "student.model_args.lora_target": lora,
            "compile_model = true": config.compile_model is True,
        }
        for key in (key for key, found in refused.items() if found):
            raise LimbeckError(
                f"{key} with {role}.strategy_args.strategy_name = megatron is not built; change it, or use fsdp2_train and "
                "fsdp2_infer."
            )
        if given.transformer_impl == "transformer_engine":
            check_transformer_engine(role)
        if given.moe_grouped_gemm and not hasattr(torch.nn.functional, "grouped_mm"):
            raise LimbeckError(
                f"{role}.strategy_args.strategy_config.moe_grouped_gemm needs PyTorch 2.10 or later, not {torch.__version__}; "
                "set it to false."
            )
        key = f"{role}.strategy_args.strategy_config.virtual_pipeline_model_parallel_size = {virtual}"
        if virtual is not None and role == "teacher":
            raise LimbeckError(f"{key} would change nothing: a teacher computes one micro-batch at a time; remove it.")
        if virtual is not None and (dims.pp == 1 or virtual == 1):
            raise LimbeckError(f"{key} needs a pipeline_model_parallel_size above 1, and to be 2 or more; remove it.")
        if role == "student" and given.recompute_granularity == "selective":
            _check_recomputed_modules(given)
        if config.features.pairs and role == "student":
            _check_recomputation(given)
        if device_type == "cpu" and not _has_cuda_device():
            raise LimbeckError(
                f"{role}.strategy_args.strategy_name: megatron-core runs on GPUs only, and there is none; use fsdp2_train and "
                "fsdp2_infer."
            )

    def check_model(self, model: Any, dims: ParallelDims, name: str, role: str) -> None:
        check_family(model, dims, name, role)

    def build_student(self, spec: StudentSpec, world: World) -> Engine:
        model, dims, config = spec.model, world.dims, spec.worker.strategy_args.strategy_config
        training, given = spec.worker.training_args, config.megatron
        outline, initial = outline_of(model), dict(unwrap_model(model).state_dict())
        trained = {name: parameter.requires_grad for name, parameter in unwrap_model(model).named_parameters()}
        before = hidden_before(model, dims) if spec.verify else None
        recompute = given.recompute_granularity == "full" or (
            given.recompute_granularity is None and recomputes_activations(spec.config, world.device.type)
        )
        by_layer = recompute and bool(spec.config.features.pairs)
        if by_layer:
            given = given.model_copy(update={"recompute_granularity": None})
        groups, bodies, weights = _build(spec, world, dims, given, "student", recompute=recompute and not by_layer)
        for trunk in bodies if by_layer else ():
            recompute_layers(trunk, given)
        weights.freeze(trained)
        pipeline = pipeline_of(dims, world)
        if world.max(not any(held.parameter.requires_grad for held in weights.held)):
            raise LimbeckError(
                f"student.strategy_args.strategy_config.pipeline_model_parallel_size = {dims.pp}: one of the stages has only "
                "frozen parameters and nothing to train; use fewer stages, or freeze less."
            )
        experts = [held for held in weights.held if is_divided_expert(held.parameter) and held.parameter.requires_grad]
        if world.max(not experts) and world.max(bool(experts)):
            raise LimbeckError(
                f"student.strategy_args.strategy_config.pipeline_model_parallel_size = {dims.pp}: one of the stages has no "
                f"experts of {spec.name} to train, with which Megatron cannot divide experts over ranks; use fewer stages, or "
                "expert_model_parallel_size = 1."
            )
        chunks = []
        for trunk in bodies:
            capture = partial(capture_in, trunk, "student")
            if trunk.gpt.post_process:
                replace_body(model, trunk)
                rows = padded_rows(trunk.get_input_embeddings().num_embeddings, dims.tp)
                root = spec.make_root(Placement(outline, rows, world.group(TP), capture=capture))
                chunks.append(Chunk(trunk, root))
            else:
                chunks.append(Chunk(trunk, term=spec.make_term(capture)))
        if not bodies[-1].gpt.post_process:
            replace_body(model, bodies[0])
        dtype = compute_dtype(spec.worker)
        engine = MegatronEngine(
            chunks,
            weights,
            initial,
            groups,
            world,
            pipeline,
            outline,
            given,
            reduce_in_float32=config.reduce_dtype == "fp32",
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_eps=training.adam_epsilon,
            clip_grad=spec.config.max_grad_norm or math.inf,  # so that the norm is computed in any case
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            initial_loss_scale=2.0**16,  # PyTorch's; many steps would overflow with Megatron's 2³²
            params_dtype=dtype,
        )
        if before is not None:
            _verify(bodies, before.to(world.device), model, dims, world, pipeline, dtype, spec.name)
        return engine

    def build_teacher(self, spec: TeacherSpec, world: World) -> FrozenModel:
        dims = self.dims(spec.worker, world.size, "teacher")
        frozen, before = (
            freeze_for_inference(spec.model, world),
            hidden_before(spec.model, dims) if spec.verify else None,
        )
        initial, names = dict(unwrap_model(spec.model).state_dict()), tuple(submodules(body(spec.model)))
        given = spec.worker.strategy_args.strategy_config.megatron
        _, bodies, weights = _build(spec, world, dims, given, "teacher", recompute=False)
        with torch.no_grad():
            for parameter, value in weights.slices(initial):
                parameter.copy_(value)
        (trunk,) = bodies
        trunk.gpt.output_layer = None  # the loss reads the whole head
        frozen.body, frozen.can_compile = trunk.requires_grad_(False), False
        frozen.group = model_parallel_group(dims, world)
        frozen.names, frozen.replaced = names, partial(capture_in, trunk, "teacher")
        if before is not None:
            dtype, pipeline = compute_dtype(spec.worker), pipeline_of(dims, world)
            _verify(bodies, before.to(world.device), spec.model, dims, world, pipeline, dtype, spec.name)
        return frozen


STRATEGY = MegatronStrategy()


def _build(
    spec: StudentSpec | TeacherSpec,
    world: World,
    dims: ParallelDims,
    given: MegatronConfig,
    role: str,
    *,
    recompute: bool,
) -> tuple[ProcessGroups, list[MegatronBody], WeightMap]:
    """The groups of ``dims``, this rank's layers without weights, and where their weights come from."""
    if world.is_main:
        warn_of_unread_keys(spec.model, spec.worker.strategy_args.strategy_config.megatron, spec.name, role)
    groups = ProcessGroups(dims, given.virtual_pipeline_model_parallel_size)
    dtype = compute_dtype(spec.worker)
    chunks = build_gpt_chunks(spec.model, dims, dtype, given, recompute=recompute, name=spec.name, role=role)
    bodies = [wrap_body(spec.model, chunk.to(world.device), groups, dims) for chunk in chunks]
    return groups, bodies, WeightMap(chunks, spec.model, groups)


def _check_recomputed_modules(given: MegatronConfig) -> None:
    """Raise LimbeckError for norms without Transformer Engine: what recomputes them reads its state without checking for it."""
    if "layernorm" in (given.recompute_modules or ()) and given.transformer_impl != "transformer_engine":
        raise LimbeckError(
            "student.strategy_args.strategy_config.recompute_modules has layernorm, which megatron-core recomputes with "
            "Transformer Engine only; remove it, or set transformer_impl: transformer_engine."
        )


def _check_recomputation(given: MegatronConfig) -> None:
    """Raise LimbeckError for recomputation that captured outputs do not survive."""
    key, one_by_one = "student.strategy_args.strategy_config", given.recompute_method == "block"
    if given.recompute_granularity == "selective" and given.recompute_modules not in (None, ["core_attn"]):
        raise LimbeckError(
            f"{key}.recompute_modules = {given.recompute_modules} with features.pairs is not built: Megatron discards what is "
            "compared; use core_attn."
        )
    if given.recompute_num_layers > 1 and not one_by_one:
        raise LimbeckError(
            f"{key}.recompute_num_layers = {given.recompute_num_layers} with features.pairs is not built: the layers are "
            "recomputed one by one; remove it."
        )


def _has_cuda_device() -> bool:
    try:
        torch.cuda.current_device()
    except (AssertionError, RuntimeError):
        return False
    return True


@torch.no_grad()
def _verify(
    bodies: Sequence[MegatronBody],
    before: Tensor,
    model: Any,
    dims: ParallelDims,
    world: World,
    pipeline: PipelineGroup | None,
    dtype: torch.dtype,
    name: str,
) -> None:
    """Raise LimbeckError if Megatron's layers give other hidden states than ``before``, those of the whole model."""
    ids = example(model, dims).to(world.device)
    own = slice(None)
    if dims.cp > 1:
        part, width = dims.coordinates(world.rank).cp, ids.shape[1] // dims.cp
        own = slice(part * width, (part + 1) * width)
    positions = torch.arange(ids.shape[1], device=world.device).unsqueeze(0)
    expected, worst = before[:, own], 0.0
    for number, trunk in enumerate(bodies):
        embedded = None
        if pipeline is not None and (number or not pipeline.is_first):
            embedded = pipeline.recv_forward(torch.empty_like(expected, dtype=dtype))
        trunk.eval()
        after = hidden_states(trunk, ids[:, own], positions[:, own], None, embedded)
        if trunk.gpt.post_process:
            apart = (after - expected).abs().amax(-1)  # of each token
            # In half precision, rounding sends some tokens to other experts.
            routed = dtype is not torch.float32 and trunk.gpt.config.num_moe_experts is not None
            worst = (apart.median() if routed else apart.max()).item()
        elif pipeline is not None:
            pipeline.send_forward(after)
    worst = world.max(worst)
    rounding = 1e-3 if dtype is torch.float32 else 0.1
    if dtype is torch.float32 and bodies[0].gpt.config.transformer_impl == "transformer_engine":
        rounding = 1e-2  # its products are in TF32
    if not worst <= rounding * before.abs().max().item():
        raise LimbeckError(
            f"{name} gives other hidden states with megatron-core than with transformers (they differ by up to {worst:.3g}); "
            "use fsdp2_train and fsdp2_infer."
        )
