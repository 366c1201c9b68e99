"""A channel that moves tensors directly between two workers' memories: Ray Direct Transport.

Ray schedules the transfers and PyTorch's communicators carry them. Ray's own communicators do not fit: its gloo one
uses the process's default process group, which the student's ranks have among themselves, and its NCCL one needs
another library. Workers on one GPU use Ray's CUDA_IPC, which hands over the memory itself. Importing this module
registers the transport in the process.
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
from limbeck.teachers.channels.ray_object_store import RayChannel
from limbeck.teachers.signals import TeacherRequest, TeacherResponse

_PAIRS = "LIMBECK"
_CONNECTING_SECONDS = 120
_TIMEOUT = timedelta(minutes=30)  # a dead peer is noticed at once by its closed connection

_stores: list[dist.TCPStore] = []
_arrived: dict[int, Any] = {}
_numbers = count()


class _Group(BaseGroup):
    """Point-to-point communicator over gloo, or NCCL where there are GPUs. The group's name is its store's
    HOST:PORT.
    """

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        host, port = group_name.rsplit(":", 1)
        self._store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_CONNECTING_SECONDS))
        self._group: Any = None
        if torch.cuda.is_available():
            self._group = dist.ProcessGroupNCCL(self._store, rank, world_size, dist.ProcessGroupNCCL.Options())
        else:
            self._group = dist.ProcessGroupGloo(self._store, rank, world_size, _TIMEOUT)

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

    def _unsupported(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("only point-to-point transfers are used")

    allreduce = allgather = barrier = broadcast = reduce = reducescatter = _unsupported


class _Transport(CollectiveTensorTransport):
    def tensor_transport_backend(self) -> str:
        return _PAIRS


register_collective_backend(_PAIRS, _Group)
register_tensor_transport(_PAIRS, ["cpu", "cuda"], _Transport, torch.Tensor)


@dataclass(frozen=True)
class DirectChannel(RayChannel):
    """As ``RayChannel``, but responses arrive in the memory of the worker ``me`` over Ray's transport ``transport``."""

    me: Any = None
    transport: str = _PAIRS

    def send(self, request: TeacherRequest | None) -> Callable[[], TeacherResponse]:
        number = next(_numbers)
        tensors = self.actor.compute.options(tensor_transport=self.transport).remote(request)
        arrival = self.me.__ray_call__.remote(_store_arrival, number, tensors)

        def response() -> TeacherResponse:
            result(arrival, self.name, self.seconds)
            return TeacherResponse(*_arrived.pop(number))

        return response


def connect(backend: str, channels: Sequence[RayChannel]) -> list[DirectChannel]:
    """Direct channels from this worker in place of ``channels``. If there are several, no other worker may use them,
    since all of them join one communicator.

    Args:
        backend: gloo, nccl-only or ipc+nccl.

    Raises:
        LimbeckError: if the workers' devices do not allow it.
    """
    destroy_all_collective_groups()  # of an earlier run of this process
    me = ray.get_runtime_context().current_actor
    calls = [("this worker", me, channels[0].seconds), *((c.name, c.actor, c.seconds) for c in channels)]
    refs = [actor.about.remote() for _, actor, _ in calls]
    ours, *theirs = (result(ref, name, seconds) for ref, (name, _, seconds) in zip(refs, calls, strict=True))
    shared = [ours["gpu"] is not None and ours["gpu"] == other["gpu"] for other in theirs]
    if backend == "nccl-only" and any(shared):
        raise LimbeckError(
            f"logits_transfer_backend = nccl-only: a student's worker and {channels[shared.index(True)].name} share a GPU, in "
            "which NCCL does not send; use ipc+nccl, or give the teacher other devices."
        )
    apart = [channel for channel, same in zip(channels, shared, strict=True) if not same]
    if apart:
        store = result(apart[0].actor.__ray_call__.remote(_open_store), apart[0].name, apart[0].seconds)
        create_collective_group([*(channel.actor for channel in apart), me], _PAIRS, store)
    return [
        DirectChannel(c.actor, c.name, c.seconds, me, "CUDA_IPC" if same else _PAIRS)
        for c, same in zip(channels, shared, strict=True)
    ]


def _open_store(worker: Any) -> str:
    host = ray.util.get_node_ip_address()
    _stores.append(dist.TCPStore(host, 0, is_master=True, wait_for_workers=False))
    return f"{host}:{_stores[-1].port}"


def _store_arrival(worker: Any, number: int, response: Any) -> None:
    _arrived[number] = response
