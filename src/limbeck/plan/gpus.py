"""What GPUs can do, as their makers say."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.errors import LimbeckError


@dataclass(frozen=True)
class Gpu:
    """memory in bytes; flops: dense bfloat16 a second; bandwidth of its memory, of the links to its neighbours (link) and of
    its share of the network between nodes, in bytes a second and one direction."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float


def _gpu(name: str, gib: float, tflops: float, tb: float, link: float, network: float) -> Gpu:
    return Gpu(name, gib * 2**30, tflops * 1e12, tb * 1e12, link * 1e9, network * 1e9)


# Memory, dense BF16, bandwidth and NVLink: NVIDIA's data sheets of each GPU, where rates "with sparsity" are halved and a
# link's two directions are counted apart. Network: one adapter for each GPU as in NVIDIA's DGX of that generation
# (A100: 200 Gb/s HDR InfiniBand; H100, H200, B200: 400 Gb/s NDR); the L40S has no NVLink (PCIe 4.0 x16) and is given 200 Gb/s.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40GB", 40, 312, 1.555, 300, 25),  # A100 data sheet, SXM
        _gpu("A100", 80, 312, 2.039, 300, 25),  # A100 data sheet, 80 GB SXM
        _gpu("L40S", 48, 362, 0.864, 32, 25),  # L40S data sheet
        _gpu("H100", 80, 989, 3.35, 450, 50),  # H100 data sheet, SXM
        _gpu("H200", 141, 989, 4.8, 450, 50),  # H200 data sheet, SXM
        _gpu("B200", 180, 2250, 8.0, 900, 50),  # DGX B200 data sheet, an eighth of the whole
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name`` in any case; LimbeckError names those that are known."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise LimbeckError(f"--gpu {name} is not a GPU that is known here; use one of {', '.join(GPUS)}.")
