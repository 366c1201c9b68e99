"""A plug-in for tests: lets megatron-core run on a CPU with gloo, by replacing the CUDA calls that it always makes.

``torch.cuda.is_available()`` stays False. Nothing here says anything about NCCL, overlap, Transformer Engine or GPUs.
"""

import contextlib
import functools
import threading

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode

from limbeck.strategies.megatron.strategy import MegatronStrategy

CPU = torch.device("cpu")


class CudaToCpu(TorchFunctionMode):
    """Redirects to the CPU every torch function that names a CUDA device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)  # optimizers accept no other type of parameter
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return func(*args, **kwargs)


class NoStream:
    """Work on a CPU is already in order."""

    def __init__(self, *args, **kwargs) -> None: ...

    def __getattr__(self, name):
        return lambda *args, **kwargs: self


def all_gather(outputs, x, group=None, *, _all_gather=dist.all_gather, **options):
    """With outputs of different lengths, as on NCCL."""
    if len({len(out) for out in outputs}) == 1:
        _all_gather(outputs, x, group, **options)
        return
    for rank, out in enumerate(outputs):
        dist.broadcast(out.copy_(x) if rank == group.rank() else out, group=group, group_src=rank)


def reduce_scatter(out, inputs, group=None, *, _reduce_scatter=dist.reduce_scatter, **options):
    """With inputs of different lengths, as on NCCL."""
    if len({len(x) for x in inputs}) == 1:
        _reduce_scatter(out, inputs, group=group, **options)
        return
    for rank, x in enumerate(inputs):
        summed = x.clone()
        dist.all_reduce(summed, group=group)
        if rank == group.rank():
            out.copy_(summed)


REDIRECTED = threading.local()


def redirected(function):
    """``function`` in a thread that has redirected its own calls, for the rest of its life.

    A mode of PyTorch is of one thread, and workers of a group load plug-ins in another than the one that trains.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        if not hasattr(REDIRECTED, "mode"):
            REDIRECTED.mode = CudaToCpu()
            REDIRECTED.mode.__enter__()
        return function(*args, **kwargs)

    return run


def install() -> None:
    """Call it once per process."""
    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *args, **kwargs: None
    # The dispatcher of experts copies sizes to the host on a stream of its own, and converts only tensors on a GPU.
    cuda.Stream, cuda.current_stream = NoStream, lambda *args, **kwargs: NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    token_dispatcher.maybe_move_tensor_to_cpu = lambda x, as_numpy=False, **kwargs: (
        x.numpy() if as_numpy and torch.is_tensor(x) else x
    )
    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    tensor_parallel_random._get_cuda_rng_state = cuda.get_rng_state
    tensor_parallel_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    redirected(lambda: None)()
    for name in ("build_student", "build_teacher"):
        setattr(MegatronStrategy, name, redirected(getattr(MegatronStrategy, name)))


install()
