"""Applies tensor, context and pipeline parallelism to a loaded Hugging Face model, and verifies the result.

Everything here happens before FSDP shards what is left. The order is: pipeline stage, tensor-parallel slices, context-parallel
attention. Nothing of it runs where all three sizes are 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.models import (
    body,
    decoder_layers,
    hidden_states,
    output_head,
    recurrent_layers,
    unwrap_model,
    use_eager_on_cpu,
)
from limbeck.strategies.base import MODEL, ModelOutline, ModelParallelGroup
from limbeck.strategies.context_parallel import apply_context_parallel
from limbeck.strategies.parallel_dims import CP, PP, TP, ParallelDims
from limbeck.strategies.pipeline_parallel import PipelineGroup, check_pipeline, keep_stage
from limbeck.strategies.tensor_parallel import apply_tensor_parallel, check_tensor_parallel, sum_partial_gradients
from limbeck.strategies.world import World

_TOKENS = 4  # per context-parallel rank, in the verification


def outline_of(model: Any) -> ModelOutline:
    """The facts about a whole Hugging Face causal language model that its stages need."""
    trained = {f"{MODEL}{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
    every, head = model.named_parameters(remove_duplicate=False), output_head(model).weight
    tied = [f"{MODEL}{name}" for name, parameter in every if parameter is head]
    return ModelOutline(
        frozenset(trained),
        sum(parameter.numel() for parameter in model.parameters()),
        model.config.get_text_config().hidden_size,
        (tied[0], tied[-1]) if len(tied) > 1 else None,
    )


def check_model_parallel(model: Any, dims: ParallelDims, name: str, role: str) -> None:
    """Raise LimbeckError unless the model ``name`` can be divided by the model parallelism of ``dims``."""
    divided = {
        f"context_parallel_size = {dims.cp}": dims.cp > 1,
        "sequence_parallel = true": dims.tp > 1 and dims.sequence_parallel,
    }
    for key in (key for key, found in divided.items() if found and recurrent_layers(body(model))):
        raise LimbeckError(
            f"{role}.strategy_args.strategy_config.{key}: {name} has recurrent layers (Mamba), which need whole rows; remove "
            "the key."
        )
    check_tensor_parallel(body(model), dims, name, role)
    check_pipeline(body(model), dims.pp, name, role)


def pipeline_of(dims: ParallelDims, world: World) -> PipelineGroup | None:
    """This rank's pipeline; None if it has all layers."""
    group = dims.group(world.device.type, PP)
    return None if group is None else PipelineGroup(group)


def model_parallel_group(dims: ParallelDims, world: World) -> ModelParallelGroup | None:
    """The groups of this rank's replica of a model; None if every rank computes whole batches.

    Where the ranks of a replica have different batches (the student of ``world`` divides its ranks less), each brings its own.
    """
    group = dims.model_group(world.device.type)
    if group is None:
        return None
    ranks = dist.get_process_group_ranks(group)
    owners = tuple(rank for rank in ranks if rank == ranks[0] or world.dims.leads_model_group(rank))
    owner = max(rank for rank in owners if rank <= world.rank)
    return ModelParallelGroup(group, dims.group(world.device.type, CP), pipeline_of(dims, world), owners, owner)


def apply_model_parallel(
    model: Any, dims: ParallelDims, world: World, name: str, *, verify: bool = True
) -> Callable[[], None]:
    """Divide ``model`` over the tensor-, context- and pipeline-parallel ranks of ``dims`` in place.

    Args:
        model: whole, on the CPU. No device ever holds more of it than its own part.
        name: for error messages.
        verify: compare hidden states before and after; False where tensors have no values.

    Returns:
        A function that sums the gradients of which every tensor-parallel rank has a part; to be called before clipping.

    Raises:
        LimbeckError: if the divided model gives other hidden states than the whole one.
    """
    if dims.model_parallel_size == 1:
        return lambda: None
    pipeline = pipeline_of(dims, world)
    before = hidden_before(model, dims) if verify else None
    trunk = body(model)
    partial_gradients: list[nn.Module] = []
    with torch.no_grad():
        if pipeline is not None:
            keep_stage(unwrap_model(model), trunk, pipeline.stage, pipeline.num_stages)
        if dims.tp > 1:
            mesh = dims.mesh(world.device.type)[TP]
            layers = decoder_layers(trunk)
            partial_gradients = apply_tensor_parallel(
                unwrap_model(model), trunk, layers, mesh, sequence=dims.sequence_parallel, given=dims.tp_plan
            )
        context = dims.group(world.device.type, CP)
        if context is not None:
            apply_context_parallel(unwrap_model(model), trunk, context, name)
    if before is not None:
        _verify(model, dims, world, pipeline, before.to(world.device), name)
    if dims.tp == 1:
        return lambda: None
    return partial(sum_partial_gradients, partial_gradients, dims.mesh(world.device.type)[TP])


def example(model: Any, dims: ParallelDims) -> Tensor:
    """[1, time] token ids for comparing hidden states before and after ``model`` is divided."""
    time = _TOKENS * dims.cp
    return torch.arange(1, 1 + time).unsqueeze(0) % model.config.get_text_config().vocab_size


@torch.no_grad()
def hidden_before(model: Any, dims: ParallelDims) -> Tensor:
    """[1, time, hidden] of the whole model, computed where it was loaded: on the CPU."""
    was_training = model.training
    trunk = body(model).eval()
    with use_eager_on_cpu(unwrap_model(model), model.device):
        hidden = hidden_states(trunk, example(model, dims).to(model.device), None)
    model.train(was_training)
    return hidden


@torch.no_grad()
def _verify(
    model: Any, dims: ParallelDims, world: World, pipeline: PipelineGroup | None, before: Tensor, name: str
) -> None:
    was_training = model.training
    trunk = body(model.to(world.device)).eval()
    ids = example(model, dims).to(world.device)
    part = dims.coordinates(world.rank).cp
    own = slice(_TOKENS * part, _TOKENS * (part + 1)) if dims.cp > 1 else slice(None)
    positions = torch.arange(ids.shape[1], device=world.device).unsqueeze(0)
    embedded = None
    if pipeline is not None and not pipeline.is_first:
        embedded = pipeline.recv_forward(torch.empty_like(before[:, own]))
    try:
        after = hidden_states(trunk, ids[:, own], positions[:, own], None, embedded)
    except RuntimeError as error:
        if dims.tp_plan is None:
            raise
        raise LimbeckError(
            f"{name} ({type(trunk).__name__}) cannot compute with the slices of tensor_parallel_plan ({error}); correct it, or "
            "remove it to use the model's own."
        ) from error
    if pipeline is not None and not pipeline.is_last:
        pipeline.send_forward(after)
        after = before[:, own]  # the last stage alone can compare
    model.train(was_training)
    worst = world.max((after - before[:, own]).abs().max().float().item())
    coarse = before.dtype in (torch.bfloat16, torch.float16)
    if not worst <= (0.1 if coarse else 1e-3) * before.abs().max().item():
        remedy = "" if dims.tp_plan is None else "correct tensor_parallel_plan, or "
        raise LimbeckError(
            f"{name} ({type(trunk).__name__}) gives other hidden states with tensor_model_parallel_size = {dims.tp}, "
            f"context_parallel_size = {dims.cp} and pipeline_model_parallel_size = {dims.pp} (they differ by up to "
            f"{worst:.3g}); {remedy}set all to 1, and FSDP2 shards it all the same."
        )
