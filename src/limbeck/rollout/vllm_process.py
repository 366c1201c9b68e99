"""One engine of vLLM in processes and on devices of its own.

    generator = SeparateVllm(*student_outline(config, world), devices=[1], max_model_len=1024)

vLLM's frontend is in the training process and its workers are in others, which vLLM starts and watches. New weights go
directly from this process to the workers through vLLM's API for weight transfer: with its backend ``nccl`` from GPU to GPU,
and on CPUs with the backend ``gloo`` of ``vllm_worker.py``. They are sent in parts, so that a gathered model is never
whole in the memory of the trainer.
"""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import resource_tracker
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.rollout.vllm import VllmGenerator, explained, start_engine

_EXTENSION = "limbeck.rollout.vllm_worker.WorkerExtension"
_PART_BYTES = 2**30  # of weights that are sent together
_SECONDS = 120.0  # for one tensor with gloo; the training then notices an engine that has failed and does not receive

Part = list[tuple[str, Tensor]]
"""Some weights, by name."""


class SeparateVllm(VllmGenerator):
    """``VllmGenerator`` whose engine computes on ``devices``, in other processes.

    devices: numbers of visible GPUs, ``tensor_parallel_size`` of them; on CPUs only their number counts. The other arguments
    are those of ``VllmGenerator``. ``offload`` and ``reload`` do nothing, because nothing else needs the devices.

    Raises:
        LimbeckError: like ``VllmGenerator``; also if a process of the engine ends.
    """

    _OWN = VllmGenerator._OWN - {"tensor_parallel_size"} | {
        *("device_ids", "enable_sleep_mode", "weight_transfer_config", "worker_extension_cls")
    }
    _WHY = "which places its engines on rollout.device_mapping"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_model_len: int,
        devices: Sequence[int],
        device_type: str = "cpu",
        arguments: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._devices, self._device_type, self._dtype = list(devices), device_type, model.dtype
        self._sender: _Sender | None = None
        super().__init__(model, tokenizer, max_model_len, device_type, 1, arguments, trust_remote_code)

    def _defaults(self, on_cpu: bool, arguments: Mapping[str, Any]) -> dict[str, Any]:
        defaults = {**super()._defaults(on_cpu, arguments), "enable_sleep_mode": False}
        defaults.pop("gpu_memory_utilization", None)  # vLLM's own: no training shares the GPU
        return defaults

    def _start(self, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
        on_cpu = self._device_type == "cpu"
        placed = {
            **arguments,
            "weight_transfer_config": {"backend": "gloo" if on_cpu else "nccl"},
            "worker_extension_cls": _EXTENSION,
            **({} if on_cpu else {"device_ids": self._devices}),
            **({"distributed_executor_backend": "mp"} if len(self._devices) > 1 else {}),  # also in a worker of Ray
        }
        with _new_processes():
            vllm, llm = start_engine(model, tokenizer, self._weights.vocab_size, placed)
        with explained("vLLM's processes could not be connected to the training"):
            llm.collective_rpc("end_with_process", args=(os.getpid(),))
            self._sender = (_GlooSender if on_cpu else _NcclSender)(llm, 1 + len(self._devices))
        return vllm, llm

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        with self.updating(version) as send:
            for part in self.parts(weights):
                send(part)

    def parts(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Part]:
        """What ``updating`` sends, from all ``weights`` of the student; see ``Generator.update_weights``."""
        return _parts(self._weights.complete(weights), torch.device(self._device_type), self._dtype)

    @contextmanager
    def updating(self, version: int) -> Iterator[Callable[[Part], None]]:
        """The function that sends a part of the weights. They are loaded at the end of the block."""
        assert self._sender is not None
        with self._usable("vLLM could not load the student's weights"):
            self._llm.start_weight_update()
            yield self._sender.send
            self._llm.finish_weight_update()
        self._has_weights, self.version = True, version

    def close(self) -> None:
        """End the processes of the engine."""
        self._has_failed = True
        self._sender = None
        self._llm.llm_engine.engine_core.shutdown()


class _Sender(Protocol):
    """The trainer's end of a transfer to the workers of an engine."""

    def send(self, part: Part) -> None:
        """Send weights within an update of the engine; returns when they are loaded."""


class _GlooSender:
    def __init__(self, llm: Any, size: int) -> None:
        from limbeck.rollout import vllm_worker

        self._llm, self._broadcast = llm, vllm_worker.broadcast
        timeout = timedelta(seconds=_SECONDS)
        store = dist.TCPStore(vllm_worker.HOST, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        info = {"port": store.port, "size": size, "seconds": _SECONDS}
        with _meanwhile(llm.init_weight_transfer_engine, {"init_info": info}):
            self._group = vllm_worker.gloo_group(store, 0, size, timeout)

    def send(self, part: Part) -> None:
        info = {
            "names": [name for name, _ in part],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
            "shapes": [list(tensor.shape) for _, tensor in part],
        }
        with _meanwhile(self._llm.update_weights, {"update_info": info}):
            for _, tensor in part:
                self._broadcast(tensor.contiguous(), self._group)


class _NcclSender:
    """Uses vLLM's ``NCCLTrainerWeightTransferEngine``, for which this is the client that calls the engine."""

    def __init__(self, llm: Any, size: int) -> None:
        from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        part: Part = []

        class PartSource(WeightSource):
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in part]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return iter(part)

        self._llm, self._part = llm, part
        info = NCCLTrainerInitInfo("127.0.0.1", get_open_port(), size, rank=0)
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self, source=PartSource())

    def send(self, part: Part) -> None:
        self._part[:] = part
        self._trainer.send_weights()
        self._part.clear()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """An update has several parts, which ``SeparateVllm`` starts."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """``SeparateVllm`` finishes it."""


def _parts(weights: Iterator[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
    """Groups of ``weights`` of at least ``_PART_BYTES`` on ``device``, with floating-point tensors in ``dtype``."""
    part: Part = []
    size = 0
    for name, tensor in weights:
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        part.append((name, tensor))
        size += tensor.nbytes
        if size >= _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


@contextmanager
def _meanwhile(call: Any, *arguments: Any) -> Iterator[None]:
    """Run ``call`` in a thread during the block. Its error explains one of the block, whose peer is gone."""
    threads = ThreadPoolExecutor(1, "vllm")
    running = threads.submit(call, *arguments)
    try:
        yield
    except RuntimeError:
        running.result(timeout=_SECONDS)
        raise
    finally:
        threads.shutdown(wait=False)
    running.result()


@contextmanager
def _new_processes() -> Iterator[None]:
    """In the block, processes start with a new interpreter, without the launcher's variables and without Ctrl-C.

    Ctrl-C in a terminal reaches every process; the trainer decides when its engine ends. A new interpreter would import the
    main module again, which may be a script without a main guard.
    """
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    removed = {name for name in os.environ if name in launcher or name.startswith("TORCHELASTIC_")}
    before = {name: os.environ.pop(name) for name in removed}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    resource_tracker.ensure_running()  # it would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.modules["__main__"] = main
        os.environ |= before
