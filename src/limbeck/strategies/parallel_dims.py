"""How the ranks of a run divide one model and its data: one frozen dataclass over one ``DeviceMesh`` with named
dimensions.

Ranks are numbered with the tensor-parallel ranks closest together, then context, pipeline, sharded and replicated
data-parallel ranks, so that the ranks that communicate most share a machine. All rank arithmetic of the package is in
this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from limbeck.config.schema import StrategyConfig
from limbeck.errors import LimbeckError

TP, CP, PP, DP_SHARD, DP_REPLICATE = "tp", "cp", "pp", "dp_shard", "dp_replicate"
_MODEL_AXES = (PP, CP, TP)
_SIZES = "tensor_model_parallel_size × context_parallel_size × pipeline_model_parallel_size"


class Coordinates(NamedTuple):
    """Position of one rank along each dimension."""

    dp_replicate: int
    dp_shard: int
    pp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the mesh dimensions of one model.

    dp_replicate: groups that hold whole copies and read different rows. dp_shard: ranks that read different rows and
    shard the parameters of one copy (FSDP, ZeRO). cp: context-parallel ranks, each with a part of every row's time. tp:
    tensor-parallel ranks, each with a slice of every matrix. pp: pipeline stages. ep: ranks between which the experts of a
    layer are divided (Megatron). etp: ranks that each have a slice of every matrix of an expert. The ep · etp ranks of a
    group are neighbours on a stage: they span tp and cp first, then dp_shard. sequence_parallel: tensor-parallel ranks also
    divide the time of activations between their slices. tp_plan: the plan of tensor parallelism, if it is not the model's own.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    tp_plan: Mapping[str, str] | str | None = field(default=None, compare=False)  # meshes do not depend on it

    @classmethod
    def from_config(cls, given: StrategyConfig, ranks: int, role: str, *, shard: bool = True) -> ParallelDims:
        """The dimensions of ``ranks`` ranks under a ``strategy_config``.

        Args:
            given: the sizes of model parallelism and of FSDP.
            ranks: number of processes.
            role: ``"student"`` or ``"teacher"``, for error messages.
            shard: False if every rank (or model-parallel group) keeps whole parameters.

        Raises:
            LimbeckError: if the sizes do not divide the ranks.
        """
        tp, cp, pp = (
            given.tensor_model_parallel_size,
            given.context_parallel_size,
            given.pipeline_model_parallel_size,
        )
        if ranks % (tp * cp * pp):
            fitting = [size for size in range(1, ranks + 1) if ranks % size == 0]
            raise LimbeckError(
                f"{role}.strategy_args.strategy_config: {_SIZES} = {tp} × {cp} × {pp} does not divide the {ranks} "
                f"{'process' if ranks == 1 else 'processes'}; make their product {join_or(fitting)}, or start another number "
                "of processes."
            )
        data = ranks // (tp * cp * pp)
        if shard:
            shards, ep, etp = _shards(given, data, cp, tp, role), 1, 1
        else:
            ep, etp = given.megatron.expert_model_parallel_size, given.megatron.expert_tensor_parallel_size or tp
            shards = _expert_shards(ep, etp, data, cp, tp, role)
        return cls(
            *(data // shards, shards, cp, tp, pp, ep, etp),
            sequence_parallel=given.sequence_parallel,
            tp_plan=given.tensor_parallel_plan,
        )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data_size * self.model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Neighbouring ranks that work on the same rows: tp · cp · pp."""
        return self.tp * self.cp * self.pp

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the model between them; they run every forward pass together."""
        return self.dp_shard * self.model_parallel_size

    @property
    def data_size(self) -> int:
        """Number of parts into which the rows of a step are divided."""
        return self.dp_replicate * self.dp_shard

    @property
    def gradient_parts(self) -> int:
        """Number of ranks whose gradients are averaged, each from other rows or from another part of a row's time."""
        return self.data_size * self.cp

    @property
    def loss_ranks(self) -> int:
        """Number of ranks that compute a loss: those of the last pipeline stage."""
        return self.gradient_parts * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """Position of ``rank`` along each dimension."""
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        rank, pp = divmod(rank, self.pp)
        replicate, shard = divmod(rank, self.dp_shard)
        return Coordinates(replicate, shard, pp, cp, tp)

    def rank_at(self, *, pp: int) -> int:
        """The first rank of pipeline stage ``pp``."""
        return pp * self.cp * self.tp

    def data_rank(self, rank: int) -> int:
        """Which part of the rows ``rank`` reads, of ``data_size``."""
        return rank // self.model_parallel_size

    def leads_model_group(self, rank: int) -> bool:
        """Whether ``rank`` is the first of the ranks that work on the same rows."""
        return rank % self.model_parallel_size == 0

    def describe(self) -> str:
        """The model parallelism in words; empty if every rank computes whole rows with the whole model."""
        matrices = f"matrices over {self.tp} ranks" + (" with sequence parallelism" if self.sequence_parallel else "")
        experts = f"experts over {self.ep}"
        parts = {
            matrices: self.tp,
            f"rows over {self.cp}": self.cp,
            f"layers over {self.pp}": self.pp,
            experts: self.ep,
        }
        return ", ".join(words for words, size in parts.items() if size > 1)

    def mesh(self, device_type: str) -> DeviceMesh:
        """The mesh, with the dimensions that are larger than 1 and ``dp_shard``; made once for a process group."""
        return _mesh(self, device_type)

    def group(self, device_type: str, axis: str) -> dist.ProcessGroup | None:
        """The process group of this rank along ``axis``; None if that dimension has size 1."""
        if getattr(self, axis) == 1:
            return None
        return self.mesh(device_type).get_group(axis)

    def model_group(self, device_type: str) -> dist.ProcessGroup | None:
        """The process group of the ranks that work on the same rows; None if there is only one."""
        return None if self.model_parallel_size == 1 else _flat_group(self, device_type, _MODEL_AXES)

    def fsdp_mesh(self, device_type: str, *, replicate: bool = False) -> DeviceMesh:
        """The one- or two-dimensional mesh that ``fully_shard`` takes: [copies ×] shards, per pipeline stage and tensor
        rank.

        Context-parallel ranks share the parameters too, unless ``replicate`` keeps a whole copy on every rank.
        """
        return _fsdp_mesh(self, device_type, replicate)

    def pipelines(self) -> Tensor:
        """[pipelines, pp] ranks of every pipeline."""
        return self._grid().movedim(2, -1).reshape(-1, self.pp)

    def expert_ranks(self) -> Tensor:
        """[pp, copies, ep, etp] ranks by what they hold of the experts."""
        return self._grid().movedim(2, 0).reshape(self.pp, -1, self.ep, self.etp)

    def _grid(self) -> Tensor:
        return torch.arange(self.size).view(self.dp_replicate, self.dp_shard, self.pp, self.cp, self.tp)


def _shards(given: StrategyConfig, data: int, cp: int, tp: int, role: str) -> int:
    """dp_shard for ``data`` data-parallel groups; ``fsdp_size`` counts context-parallel ranks too."""
    ranks, size = data * cp, given.fsdp_size or 0
    if given.replicate:
        return 1
    if size <= 1 or size >= ranks:
        return data
    if ranks % size:
        unit = "processes" if tp == 1 else f"groups of {tp} tensor ranks"
        raise LimbeckError(
            f"{role}: strategy_config.fsdp_size = {size} does not divide the {ranks} {unit}; use a divisor, or leave it unset "
            "to shard over all of them."
        )
    if size % cp:
        raise LimbeckError(
            f"{role}: strategy_config.fsdp_size = {size} is not a multiple of context_parallel_size = {cp}, whose ranks share "
            "parameters; use a multiple, or leave it unset to shard over all ranks."
        )
    return size // cp


def _expert_shards(ep: int, etp: int, data: int, cp: int, tp: int, role: str) -> int:
    """dp_shard for experts that are divided: the data-parallel ranks of which each has some of the experts."""
    section = f"{role}.strategy_args.strategy_config"
    if etp not in (1, tp):
        raise LimbeckError(
            f"{section}.expert_tensor_parallel_size = {etp} is neither 1 nor tensor_model_parallel_size = {tp}; set one."
        )
    group, stage = ep * etp, tp * cp * data
    if stage % group or (group % (tp * cp) and tp * cp % group):
        sizes = [n * etp for n in range(1, stage // etp + 1) if stage % (n * etp) == 0]
        fitting = [size // etp for size in sizes if size % (tp * cp) == 0 or tp * cp % size == 0]
        raise LimbeckError(
            f"{section}.expert_model_parallel_size = {ep} does not divide the {stage} ranks of a pipeline stage (tensor × "
            f"context × data parallel) with expert_tensor_parallel_size = {etp}; use {join_or(fitting)}."
        )
    return max(1, group // (tp * cp))


# The numbers in a mesh are read, also inside a fake tensor mode, where tensors have none.
@cache
@unset_fake_temporarily()
def _mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    sizes = {PP: dims.pp, DP_REPLICATE: dims.dp_replicate, DP_SHARD: dims.dp_shard, CP: dims.cp, TP: dims.tp}
    used = {name: size for name, size in sizes.items() if size > 1 or name == DP_SHARD}
    ranks = dims._grid().movedim(2, 0).reshape(tuple(used.values()))
    return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(used))


@cache
@unset_fake_temporarily()
def _flat_group(dims: ParallelDims, device_type: str, axes: tuple[str, ...]) -> dist.ProcessGroup:
    mesh = _mesh(dims, device_type)
    used = tuple(axis for axis in axes if axis in (mesh.mesh_dim_names or ()))
    return mesh.get_group(used[0]) if len(used) == 1 else mesh[used]._flatten("_".join(used)).get_group()


@cache
@unset_fake_temporarily()
def _fsdp_mesh(dims: ParallelDims, device_type: str, replicate: bool) -> DeviceMesh:
    mesh = _mesh(dims, device_type)
    names = mesh.mesh_dim_names or ()
    copies = [name for name in (DP_REPLICATE, CP) if name in names and (replicate or name != CP)]
    shards = [name for name in (DP_SHARD, CP) if name in names and (not replicate or name != CP)]
    if len(shards) > 1 and dims.dp_shard == 1:
        shards = [CP]
    axes = []
    for group in (copies, shards):
        if len(group) > 1:
            mesh[tuple(group)]._flatten("_".join(group))
        if group:
            axes.append("_".join(group))
    return mesh[tuple(axes)]


def forget_meshes() -> None:
    """Drop the meshes of a process group that has ended."""
    for cached in (_mesh, _flat_group, _fsdp_mesh):
        cached.cache_clear()


def join_or(sizes: list[int]) -> str:
    """``[1, 2, 4]`` as "1, 2 or 4"."""
    return f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
