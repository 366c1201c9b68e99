"""What vLLM's processes run for the generator ``vllm`` on devices of its own. vLLM imports it as its worker extension.

On GPUs, vLLM's own backend ``nccl`` receives the weights. vLLM has no backend for CPUs; this module registers ``gloo``.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

HOST = "127.0.0.1"


class WorkerExtension:
    """Methods of every worker of vLLM, which ``collective_rpc`` calls."""

    def end_with_process(self, pid: int) -> None:
        """End this process when the process ``pid`` has ended, even if that was killed."""
        process = os.pidfd_open(pid)

        def wait() -> None:
            select.select([process], [], [])
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=wait, daemon=True).start()


def gloo_group(store: dist.TCPStore, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group of the trainer (rank 0) and the workers of an engine, beside the default one."""
    return dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, size, timeout)


def broadcast(tensor: torch.Tensor, group: Any) -> None:
    """Send ``tensor`` from rank 0 to the others, in place."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    # As bytes: gloo does not know every dtype.
    group.broadcast([tensor.reshape(-1).view(torch.uint8)], options).wait()


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer's store is. size: number of processes of the group. seconds: timeout of a transfer."""

    port: int
    size: int
    seconds: float


class GlooWeightTransfer(WeightTransferEngine):
    """Receives weights on a CPU, one tensor at a time, and loads them like a checkpoint."""

    init_info_cls = GlooInitInfo
    update_info_cls = NCCLWeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        timeout = timedelta(seconds=init_info.seconds)
        store = dist.TCPStore(HOST, init_info.port, is_master=False, timeout=timeout)
        self._group = gloo_group(store, 1 + self.parallel_config.rank, init_info.size, timeout)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, list[str]]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # the base class waits for a GPU too

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            broadcast(tensor, self._group)
            self.model.load_weights([(name, tensor)])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        del self._group


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransfer)
