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

_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """This process among its equals.

    device: where its models live. patient: the group that ``wait`` meets in. tensor: neighbouring ranks that hold slices of one
    student and do the same with the same rows. context: such groups that share rows, each with a stretch of their time.
    pipeline: groups of these that share rows, each with some of the layers.
    """

    rank: int
    size: int
    device: torch.device
    barrier_group: dist.ProcessGroup | None = None
    tensor: int = 1
    context: int = 1
    pipeline: int = 1

    @property
    def together(self) -> int:
        """Neighbouring ranks that work on the same rows."""
        return self.tensor * self.context * self.pipeline

    @property
    def data_rank(self) -> int:
        """Which share of the data this process sees."""
        return self.rank // self.together

    @property
    def data_size(self) -> int:
        """The number of shares into which the data is dealt."""
        return self.size // self.together

    @property
    def context_rank(self) -> int:
        """Which stretch of its rows this process sees."""
        return self.rank // self.tensor % self.context

    @property
    def grad_shares(self) -> int:
        """The number of parts of a step's gradient, whose mean is taken."""
        return self.size // (self.tensor * self.pipeline)

    @property
    def losses(self) -> int:
        """The number of ranks that compute a loss: those that hold the student's last layer."""
        return self.size // self.pipeline

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
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

    def wait(self) -> None:
        """Return when every process has come here, however long one takes: the first tokenisation may take hours."""
        if self.size > 1:
            dist.barrier(group=self.barrier_group)


@contextmanager
def start_world(timeout_minutes: float = 30) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment (gloo on CPUs, NCCL on GPUs), or be alone."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    started = size > 1 and not dist.is_initialized()
    if started:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        # A process that ends ends the others' waiting too, by its closed connections and by whoever started it.
        barrier_group = dist.new_group(backend="gloo", timeout=_PATIENCE) if size > 1 else None
        yield World(rank, size, device, barrier_group)
    finally:
        if started:
            # FSDP's modules and hooks form cycles; one that outlives its process group aborts the interpreter at exit.
            gc.collect()
            dist.destroy_process_group()
