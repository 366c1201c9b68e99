"""A channel that sends tensors directly from worker to worker, with Ray Direct Transport.

Ray schedules the transfers; PyTorch's communicators execute them. Ray's own communicators cannot be used: its gloo one
uses the default process group, which is the student's, and its NCCL one needs CuPy. Workers on one GPU use Ray's
CUDA_IPC, which shares the memory. Importing this module registers the transport in the process.
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

_TRANSPORT = "LIMBECK"
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
        return _TRANSPORT

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
        return _TRANSPORT


register_collective_backend(_TRANSPORT, _Group)
register_tensor_transport(_TRANSPORT, ["cpu", "cuda"], _Transport, torch.Tensor)


@dataclass(frozen=True)
class DirectChannel(RayChannel):
    """A ``RayChannel`` whose responses arrive in the memory of the worker ``receiver`` over Ray's ``transport``."""

    receiver: Any = None
    transport: str = _TRANSPORT

    def send(self, request: TeacherRequest | None) -> Callable[[], TeacherResponse]:
        number = next(_numbers)
        tensors = self.actor.compute.options(tensor_transport=self.transport).remote(request)
        arrival = self.receiver.__ray_call__.remote(_store_arrival, number, tensors)

        def response() -> TeacherResponse:
            result(arrival, self.name, self.seconds)
            return TeacherResponse(*_arrived.pop(number))

        return response


def open_direct_channels(backend: str, channels: Sequence[RayChannel]) -> list[DirectChannel]:
    """Direct channels from this worker to the teacher ranks of ``channels``.

    If there are several channels, no other worker may use them, because their ranks join one communicator.

    Args:
        backend: ``gloo``, ``nccl-only`` or ``ipc+nccl``.

    Raises:
        LimbeckError: if the workers' devices do not allow it.
    """
    destroy_all_collective_groups()  # of an earlier run of this process
    receiver = ray.get_runtime_context().current_actor
    seconds = channels[0].seconds
    reports = [
        (actor.about.remote(), name)
        for actor, name in [(receiver, "this worker"), *((c.actor, c.name) for c in channels)]
    ]
    ours, *theirs = (result(ref, name, seconds) for ref, name in reports)
    shared = [ours["gpu"] is not None and ours["gpu"] == other["gpu"] for other in theirs]
    if backend == "nccl-only" and any(shared):
        raise LimbeckError(
            f"logits_transfer_backend = nccl-only: a student's worker and {channels[shared.index(True)].name} share a GPU, in "
            "which NCCL does not send; use ipc+nccl, or give the teacher other devices."
        )
    apart = [channel for channel, same in zip(channels, shared, strict=True) if not same]
    if apart:
        store = result(apart[0].actor.__ray_call__.remote(_open_store), apart[0].name, seconds)
        create_collective_group([*(channel.actor for channel in apart), receiver], _TRANSPORT, store)
    return [
        DirectChannel(c.actor, c.name, c.seconds, receiver, "CUDA_IPC" if same else _TRANSPORT)
        for c, same in zip(channels, shared, strict=True)
    ]


def _open_store(worker: Any) -> str:
    host = ray.util.get_node_ip_address()
    _stores.append(dist.TCPStore(host, 0, is_master=True, wait_for_workers=False))
    return f"{host}:{_stores[-1].port}"


def _store_arrival(worker: Any, number: int, response: Any) -> None:
    _arrived[number] = response
