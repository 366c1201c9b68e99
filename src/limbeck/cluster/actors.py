"""The base class of Ray actors: one process of a group, its log file, and its process group."""

from __future__ import annotations

import gc
import os
import platform
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from limbeck.cluster.session import load_ray
from limbeck.errors import LimbeckError
from limbeck.strategies.world import BARRIER_TIMEOUT, World
from limbeck.version import VERSION


def versions() -> dict[str, str]:
    """Versions that must be the same in all processes of a run."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "limbeck": VERSION, **{name: version(name) for name in ("torch", "transformers")}}


class Worker:
    """One process of a group.

    Args:
        name: such as ``student-0``.
        log: file that receives everything the process prints.

    ``needs``: a module that takes long to import, imported by the actors only.
    """

    needs = "torch"

    def __init__(self, name: str, log: str) -> None:
        self.name = name
        self.world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", buffering=1) as file:  # noqa: PTH123
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray uses a deprecated attribute there
            again = load_ray().get_runtime_context().was_current_actor_reconstructed
        if again:
            print(f"{name} died before; Ray has started it again, as process {os.getpid()}", flush=True)
        # Collecting garbage among thousands of modules takes a sixth of the import time and finds none.
        gc.disable()
        import_module(self.needs)
        gc.freeze()
        gc.enable()

    def about(self) -> dict[str, Any]:
        """Process, machine, versions and GPU of this actor."""
        given = load_ray().get_runtime_context().get_assigned_resources().get("GPU", 0)
        seen = torch.cuda.is_available()
        return {
            "pid": os.getpid(),
            "host": platform.node(),
            "versions": versions(),
            "gpu": str(torch.cuda.get_device_properties(0).uuid) if seen else None,
            "gpu_unseen": given > 0 and not seen,
        }

    def open_store(self) -> tuple[str, int]:
        """Open the store for the group's rendezvous on a free port; returns its host and port."""
        host = load_ray().util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def join(self, rank: int, size: int, store: tuple[str, int], minutes: float) -> None:
        """Become ``rank`` of a process group of ``size`` (gloo on CPUs, NCCL on GPUs). minutes: timeout of its collectives;
        barriers wait longer.
        """
        if not hasattr(self, "_store"):
            self._store = dist.TCPStore(store[0], store[1], is_master=False)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        backend = "cpu:gloo,cuda:nccl" if self.world.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=self._store, rank=rank, world_size=size, timeout=timedelta(minutes=minutes)
        )
        barrier_group = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT)
        self.world = World(rank, size, self.world.device, barrier_group)


@contextmanager
def failures_logged() -> Iterator[None]:
    """Print the traceback of an exception in the block to the log; the caller gets a sentence."""
    try:
        yield
    except LimbeckError:
        raise
    except BaseException:
        traceback.print_exc()
        raise
