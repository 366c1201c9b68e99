"""Tensor parallelism: every matrix of a Hugging Face model sliced over neighbouring ranks, by the plan that comes with
the model or is given.

PyTorch's ``parallelize_module`` applies it from outside; the plan's style for a module says along which side it is
sliced. Where there are fewer key and value heads than ranks, several ranks compute the same head. Embeddings and output
head are sliced over the vocabulary. What leaves a layer is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from limbeck.errors import LimbeckError
from limbeck.strategies.parallel_dims import ParallelDims, join_or
from limbeck.strategies.sequence_parallel import SequenceParallel
from limbeck.strategies.tensor_parallel_plan import PARTIAL, STYLES, GivenPlan, check_given_plan, plan_of


def check_tensor_parallel(trunk: Any, dims: ParallelDims, name: str, role: str) -> None:
    """Raise LimbeckError unless tensor and context parallelism divide the body ``trunk`` of the model ``name``."""
    if dims.model_parallel_size == 1:
        return
    config = trunk.config.get_text_config()
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes: dict[str, int] = {}
    if dims.tp > 1:
        if dims.tp_plan is not None:
            try:
                check_given_plan(trunk, dims.tp_plan)
            except LimbeckError as error:
                raise LimbeckError(f"{role}.strategy_args.strategy_config.tensor_parallel_plan: {error}") from error
        plan = plan_of(trunk, dims.tp_plan)
        if not plan:
            raise LimbeckError(
                f"{role}.strategy_args.strategy_config.tensor_model_parallel_size = {dims.tp}: {type(trunk).__name__} "
                "comes without a plan for tensor parallelism (base_model_tp_plan); set tensor_parallel_plan, or use 1, and "
                "FSDP2 shards it all the same."
            )
        for path, (style, module) in plan.items():
            known = isinstance(module, nn.Linear) if style in STYLES else style == PARTIAL
            if not known:
                raise LimbeckError(
                    f"{role}.strategy_args.strategy_config.tensor_model_parallel_size = {dims.tp}: the plan of "
                    f"{type(trunk).__name__} slices {path} in a way ({style}) that is not built; use 1, and FSDP2 shards it "
                    "all the same."
                )
            if isinstance(module, nn.Linear) and not _is_key_or_value(path):
                sliced = module.out_features if style.startswith("colwise") else module.in_features
                sizes.setdefault(f"features of {path.split('.', 2)[-1]}", sliced)
    _check_divides(dims, sizes, heads, key_value_heads, name, role)


def _check_divides(
    dims: ParallelDims, sizes: dict[str, int], heads: int, key_value_heads: int, name: str, role: str
) -> None:
    """Raise LimbeckError unless the heads and ``sizes`` of the model can be divided.

    sizes: what else the tensor-parallel ranks must divide, in words (``{"features of mlp.up_proj": 64}``). Key and
    value heads are divided, or held by several ranks where there are fewer of them.
    """

    def shared(ranks: int) -> bool:
        return heads % ranks == 0 and (key_value_heads % ranks == 0 or ranks % key_value_heads == 0)

    def sliced(tensor: int) -> bool:
        return shared(tensor) and not any(size % tensor for size in sizes.values())

    key = f"{role}.strategy_args.strategy_config"
    of_keys = "" if key_value_heads == heads else f" ({key_value_heads} of keys and values)"
    if not sliced(dims.tp):
        what = next((f"{size} {words}" for words, size in sizes.items() if size % dims.tp), None)
        what = what if shared(dims.tp) else None
        fitting = [size for size in range(1, heads + 1) if sliced(size)]
        raise LimbeckError(
            f"{key}.tensor_model_parallel_size = {dims.tp} does not divide the "
            f"{what or f'{heads} attention heads{of_keys}'} of {name}; use {join_or(fitting)}."
        )
    if not shared(dims.tp * dims.cp):
        fitting = [size for size in range(1, heads + 1) if heads % size == 0 and shared(size * dims.tp)]
        each = "" if dims.tp == 1 else f" that are left for each of {dims.tp} tensor ranks"
        raise LimbeckError(
            f"{key}.context_parallel_size = {dims.cp} does not divide the {heads // dims.tp} attention "
            f"heads{of_keys}{each} of {name}; use {join_or(fitting)}."
        )


def apply_tensor_parallel(
    model: Any,
    trunk: Any,
    layers: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    sequence: bool = False,
    given: GivenPlan | None = None,
) -> list[nn.Module]:
    """Slice ``model``, whose body is ``trunk`` with its ``layers``, over the ranks of ``mesh`` in place.

    Parameter by parameter: a slice moves to the mesh's device, so no device holds a whole matrix.

    Args:
        sequence: between the sliced matrices each rank keeps a part of the rows' time only (``sequence_parallel.py``).
        given: the plan; by default the model's own.

    Returns:
        The modules of whose gradients every rank has a part; see ``sum_partial_gradients``. The output head's weight
        becomes a slice of the vocabulary for a vocabulary-parallel loss; its own forward must not be called.
    """
    ranks, rank = mesh.size(), mesh.get_local_rank()
    config = trunk.config.get_text_config()
    heads, keys = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    styles: dict[str, ParallelStyle] = {}
    partial, entered = [], {}
    for path, (style, module) in plan_of(trunk, given).items():
        parent = path.rpartition(".")[0]
        if style == PARTIAL:
            partial.append(module)
        elif keys % ranks and _is_key_or_value(path):
            _keep_one_head(module, mesh, rank * keys // ranks, keys)
            trunk.get_submodule(parent).num_key_value_groups = heads // ranks
        else:
            styles[path] = STYLES[style]()
            if sequence and style in ("rowwise", "rowwise_split_input", "colwise_gather"):
                styles[path].output_layouts = (Shard(1),)  # type: ignore[attr-defined]
        if style.startswith("colwise"):
            entered[parent] = trunk.get_submodule(parent)
    if sequence:
        partial += SequenceParallel(mesh).apply(layers, list(entered.values()))
    trained = {name for name, parameter in trunk.named_parameters() if parameter.requires_grad}
    parallelize_module(trunk, mesh, styles, src_data_rank=None)
    for path, parameter in trunk.named_parameters():
        parameter.requires_grad_(path in trained)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    here = isinstance(embeddings, nn.Embedding)  # not with another stage of a pipeline
    tied = head is not None and here and head.weight is embeddings.weight
    if here:
        _slice_embedding(embeddings, mesh)
    if head is not None:
        head.weight = embeddings.weight if tied else _sliced(head.weight, mesh)
        if getattr(head, "bias", None) is not None:
            head.bias = _sliced(head.bias, mesh)
    return partial


@torch.no_grad()
def sum_partial_gradients(modules: list[nn.Module], mesh: DeviceMesh) -> None:
    """Sum the gradients of ``modules`` over the ranks of ``mesh``: each computed the part of its own heads."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=mesh.get_group())


def _is_key_or_value(path: str) -> bool:
    return path.endswith((".k_proj", ".v_proj"))


def _keep_one_head(projection: nn.Module, mesh: DeviceMesh, head: int, heads: int) -> None:
    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _SumGradient.apply(output, mesh.get_group()).unflatten(-1, (heads, -1))[..., head, :]

    def plain(module: nn.Module, args: Any) -> Any:
        return tuple(arg.to_local(grad_placements=[Replicate()]) if isinstance(arg, DTensor) else arg for arg in args)

    projection.register_forward_pre_hook(plain)
    projection.register_forward_hook(keep)


def _sliced(parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
    return nn.Parameter(shard, requires_grad=parameter.requires_grad)


def _slice_embedding(embeddings: Any, mesh: DeviceMesh) -> None:
    each = -(-embeddings.weight.shape[0] // mesh.size())
    start = each * mesh.get_local_rank()
    never_learns = embeddings.padding_idx
    embeddings.weight = _sliced(embeddings.weight, mesh)

    def look_up(ids: Tensor) -> Tensor:
        weight = embeddings.weight.to_local()
        here = (ids >= start) & (ids < start + len(weight))
        rows = nn.functional.embedding((ids - start).clamp(0, len(weight) - 1), weight)
        rows = torch.where(here.unsqueeze(-1), rows, 0.0)
        if never_learns is not None:
            rows = torch.where((ids == never_learns).unsqueeze(-1), rows.detach(), rows)
        return _Sum.apply(rows, mesh.get_group()) * getattr(embeddings, "embed_scale", 1.0)

    embeddings.forward = look_up


class _Sum(torch.autograd.Function):
    """Sum over a group; every rank computes the same from it, so the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumGradient(torch.autograd.Function):
    """Identity on a replicated tensor that each rank uses differently, so its gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
