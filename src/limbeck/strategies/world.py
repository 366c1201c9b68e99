"""The processes that run the same loop side by side: one alone, or those that torchrun started."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.config.launcher import launched_processes
from limbeck.strategies.parallel_dims import Coordinates, ParallelDims, forget_meshes

BARRIER_TIMEOUT = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """This process among the processes that run the same loop.

    Args:
        rank: number of this process.
        size: number of processes.
        device: where its models live.
        barrier_group: group of ``barrier``, whose timeout is long.
        dims: how the student divides the ranks; by default all of them shard it and read different rows.
    """

    rank: int
    size: int
    device: torch.device
    barrier_group: dist.ProcessGroup | None = None
    dims: ParallelDims = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.dims is None:
            object.__setattr__(self, "dims", ParallelDims(dp_shard=self.size))

    @property
    def data_rank(self) -> int:
        """Which part of the rows this process reads."""
        return self.dims.data_rank(self.rank)

    @property
    def coordinates(self) -> Coordinates:
        """Position of this process along each dimension of ``dims``."""
        return self.dims.coordinates(self.rank)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group of this rank along a dimension of ``dims``; None if that has size 1."""
        return self.dims.group(self.device.type, axis)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: float) -> float:
        """The largest ``value`` of any process; travels over the CPU, so a GPU is not waited for."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def barrier(self) -> None:
        """Return when every process has called this, however long one takes: the first tokenisation may take hours."""
        if self.size > 1:
            dist.barrier(group=self.barrier_group)


@contextmanager
def start_world(timeout_minutes: float = 30) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment (gloo on CPUs, NCCL on GPUs), or be alone."""
    size, rank = launched_processes() or 1, int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    started = size > 1 and not dist.is_initialized()
    if started:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        # A process that dies ends the others' barrier too: its connections close, and the launcher stops the rest.
        barrier_group = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT) if size > 1 else None
        yield World(rank, size, device, barrier_group)
    finally:
        if started:
            # FSDP's modules and hooks form cycles; one that outlives its process group aborts the interpreter at exit.
            gc.collect()
            dist.destroy_process_group()
            forget_meshes()
