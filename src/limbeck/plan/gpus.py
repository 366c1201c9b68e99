"""Rates of GPUs, as NVIDIA states them.

FLOP/s and memory bandwidth are those of the data sheets: A100 (nvidia-a100-datasheet, SXM), L40S (l40s-datasheet), H100 and
H200 (h100-datasheet, h200-datasheet, SXM), B200 (HGX B200 in the Blackwell data sheet). Rates "with sparsity" are halved, and
link rates are those of one direction. Memory is what ``nvidia-smi`` shows, which is a little less than the nominal size. The
network is one adapter for each GPU, as in NVIDIA's DGX of that generation: 200 Gb/s InfiniBand with A100, 400 Gb/s with H100,
H200 and B200. For the L40S, which has PCIe 4.0 x16 and no NVLink, 200 Gb/s is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.errors import LimbeckError


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU.

    memory: bytes. flops: dense bfloat16 FLOP/s. bandwidth: of its memory. link: to other GPUs of its node. network: between
    nodes. The last three in bytes per second and one direction.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float


def _gpu(name: str, mib: int, tflops: float, tb: float, link: float, network: float) -> Gpu:
    return Gpu(name, mib * 2**20, tflops * 1e12, tb * 1e12, link * 1e9, network * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40GB", 40960, 312, 1.555, 300, 25),
        _gpu("A100", 81920, 312, 2.039, 300, 25),
        _gpu("L40S", 46068, 362, 0.864, 32, 25),
        _gpu("H100", 81559, 989.4, 3.35, 450, 50),
        _gpu("H200", 143771, 989.4, 4.8, 450, 50),
        _gpu("B200", 183359, 2250, 8.0, 900, 50),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name``, in upper or lower case. Raises LimbeckError, with the known names, if there is none."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise LimbeckError(f"--gpu {name} is not a known GPU; use one of {', '.join(GPUS)}.")
