"""Tensors straight from one worker's memory to another's, past the object store: Ray Direct Transport.

Ray decides when they travel, and PyTorch's communicators carry them. Ray's own would not do: its gloo one is made inside a
process's one process group, which the student's ranks have among themselves, and its NCCL one wants another library. Where both
workers use one GPU, Ray's CUDA_IPC hands over the memory itself. Importing this makes the transport known to the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.experimental import register_tensor_transport
from ray.experimental.collective import create_collective_group, destroy_all_collective_groups
from ray.experimental.rdt.collective_tensor_transport import CollectiveTensorTransport
from ray.util.collective.backend_registry import register_collective_backend
from ray.util.collective.collective_group.base_collective_group import BaseGroup
from torch import Tensor

from limbeck.cluster.groups import result
from limbeck.errors import LimbeckError
from limbeck.teachers import TeacherRequest, TeacherResponse

_PAIRS = "LIMBECK"
_CONNECTING_SECONDS = 120
_LONGEST = timedelta(minutes=30)  # a peer that is gone is seen at once by its closed connection

_stores: list[dist.TCPStore] = []
_arrived: dict[int, Any] = {}
_numbers = count()


class _Group(BaseGroup):
    """Workers that send tensors to each other, by gloo or where they have GPUs by NCCL. Its name is its store's HOST:PORT."""

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        host, port = group_name.rsplit(":", 1)
        self._store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_CONNECTING_SECONDS))
        self._group: Any = None
        if torch.cuda.is_available():
            self._group = dist.ProcessGroupNCCL(self._store, rank, world_size, dist.ProcessGroupNCCL.Options())
        else:
            self._group = dist.ProcessGroupGloo(self._store, rank, world_size, _LONGEST)

    @classmethod
    def backend(cls) -> str:
        return _PAIRS

    @classmethod
    def check_backend_availability(cls) -> bool:
        return True

    def send(self, tensor: list[Tensor], send_options: Any) -> None:
        if tensor[0].numel():
            self._group.send(tensor, send_options.dst_rank, 0).wait()

    def recv(self, tensor: list[Tensor], recv_options: Any) -> None:
        if tensor[0].numel():
            self._group.recv(tensor, recv_options.src_rank, 0).wait()

    def destroy_group(self) -> None:
        self._group = None

    def _not_needed(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("signals are sent and received, nothing else")

    allreduce = allgather = barrier = broadcast = reduce = reducescatter = _not_needed


class _Transport(CollectiveTensorTransport):
    def tensor_transport_backend(self) -> str:
        return _PAIRS


register_collective_backend(_PAIRS, _Group)
register_tensor_transport(_PAIRS, ["cpu", "cuda"], _Transport, torch.Tensor)


@dataclass(frozen=True)
class DirectChannel:
    """The way to the worker ``actor`` over Ray's transport called ``transport``, seen from the worker ``me``."""

    actor: Any
    me: Any
    name: str
    seconds: float
    transport: str

    def ask(self, question: TeacherRequest | None) -> Callable[[], TeacherResponse]:
        """The answer comes by itself into this process's memory, and waits there."""
        number = next(_numbers)
        said = self.actor.say.options(tensor_transport=self.transport).remote(question)
        come = self.me.__ray_call__.remote(_take, number, said)

        def reply() -> TeacherResponse:
            result(come, self.name, self.seconds)
            return TeacherResponse(*_arrived.pop(number))

        return reply


def connect(backend: str, actors: Sequence[Any], names: Sequence[str], seconds: float) -> list[DirectChannel]:
    """Channels from this worker to ``actors``; several of them must be this worker's alone, as all of them meet at once.

    backend: gloo, nccl-only or ipc+nccl. Raises LimbeckError where it cannot be.
    """
    destroy_all_collective_groups()  # of an earlier run of this process
    me = ray.get_runtime_context().current_actor
    ours, *theirs = (
        result(ref, name, seconds)
        for ref, name in zip([a.about.remote() for a in (me, *actors)], ("this worker", *names), strict=True)
    )
    shared = [ours["gpu"] is not None and ours["gpu"] == them["gpu"] for them in theirs]
    if backend == "nccl-only" and any(shared):
        raise LimbeckError(
            f"logits_transfer_backend = nccl-only: a student's worker and {names[shared.index(True)]} share a GPU, in which "
            "NCCL does not send; use ipc+nccl, or give the teacher other devices."
        )
    apart = [actor for actor, same in zip(actors, shared, strict=True) if not same]
    if apart:
        name = result(apart[0].__ray_call__.remote(_open_store), names[actors.index(apart[0])], seconds)
        create_collective_group([*apart, me], _PAIRS, name)
    return [
        DirectChannel(actor, me, name, seconds, "CUDA_IPC" if same else _PAIRS)
        for actor, name, same in zip(actors, names, shared, strict=True)
    ]


def _open_store(worker: Any) -> str:
    host = ray.util.get_node_ip_address()
    _stores.append(dist.TCPStore(host, 0, is_master=True, wait_for_workers=False))
    return f"{host}:{_stores[-1].port}"


def _take(worker: Any, number: int, came: Any) -> None:
    _arrived[number] = came
