"""The elementwise pass as a Triton kernel, for whole vocabularies on both sides.

``kernel_pass`` returns the kernel for a configuration, or None. Then the pass runs in PyTorch, with the same results up to
rounding.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from limbeck.objectives.elementwise import STATS, ElementwiseSpec, Pass, TileInputs
from limbeck.objectives.kernels.source import KernelSource, Untranslatable, translate
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabReducer

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK, WARPS = 1024, 4  # eight logits per thread: one load of 16 bytes in half precision
_RESCALED = 8192  # elements of a program of ``rescale``
ROUND = 16  # elements; Triton uses vector loads only if row strides are known to be multiples of this

fallback_reasons: set[str] = set()
"""Why a kernel was not used, one sentence per reason, for reports. Each reason is warned about once."""
_build_failed = False


def kernel_pass(
    spec: ElementwiseSpec, reducer: VocabReducer, device: torch.device
) -> Callable[[Pass, TileInputs], tuple[Tensor, Tensor | None]] | None:
    """Return a function (plain pass, tile) → (stats, gradient of the bias) that launches the kernel, or None.

    Warns once if Triton cannot express the divergence, and once if the kernel cannot be built; the plain pass then runs. The
    gradient of the bias is the float32 sum of the gradients as stored.
    """
    objective = spec.objective
    if not _usable(device) or reducer is not NO_SHARDING or spec.dtype is not torch.float32:
        return None
    if objective.sampled or objective.topk or spec.rollout_temperature not in (None, 1.0):
        return None
    try:
        source = translate(objective.divergence_fn)
    except Untranslatable as why:
        _warn_once(f"This divergence has no kernel, because {why}")
        return None

    def run(plain: Pass, tile: TileInputs) -> tuple[Tensor, Tensor | None]:
        if _build_failed:
            return plain(*tile)
        try:
            return launch(tile, spec, source)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, an unknown device: nothing has been written yet
            _warn_build_failed(error)
            return plain(*tile)

    return run


def launch(tile: TileInputs, spec: ElementwiseSpec, source: KernelSource) -> tuple[Tensor, Tensor | None]:
    """Run the kernel on a tile. Returns what ``elementwise.elementwise_pass`` returns."""
    from limbeck.objectives.kernels.fused_kernel import fused_loss_kernel

    objective = spec.objective
    n, vocab = tile.z.shape
    stats = torch.zeros(n, len(STATS), dtype=torch.float32, device=tile.z.device)
    w, tau = objective.kd_weight, objective.temperature
    known = w == 0 or source.weight_sum is not None
    with torch.cuda.device(tile.z.device) if tile.z.is_cuda else nullcontext():
        fused_loss_kernel[(n,)](
            tile.z,
            tile.bias,
            tile.teacher,
            tile.teacher_bias,
            tile.target,
            tile.weight,
            tile.factor,
            stats,
            vocab,
            tile.z.stride(0),
            0 if tile.teacher is None else tile.teacher.stride(0),
            _readable_width(tile.z),
            0 if tile.teacher is None else _readable_width(tile.teacher),
            1 / tau,
            1 / objective.teacher_temperature,
            (1 - w) * spec.student.scale,
            w * (tau if objective.squared else 1 / tau) * spec.student.scale,
            float(source.weight_sum or 0.0) if w else 0.0,
            divergence_fn=source.divergence_fn,
            z_scale=spec.student.scale,
            z_cap=spec.student.softcap,
            t_scale=spec.teacher.scale,
            t_cap=spec.teacher.softcap,
            TEMPERED=tau != 1,
            GRADIENT=spec.wants_grad,
            WEIGHT_SUM_KNOWN=known,
            STATS=len(STATS),
            BLOCK=min(BLOCK, 1 << (vocab - 1).bit_length()),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    bias = tile.z.sum(0, dtype=torch.float32) if spec.wants_grad and tile.bias is not None else None
    if tile.student_log_probs is not None:  # the negative cross-entropy; 0 / 0 is NaN in a row of weight 0
        torch.div(stats[:, 1:2], -tile.weight, out=tile.student_log_probs)
    return stats.sum(0), bias


def rescale(x: Tensor, scale: Tensor) -> bool:
    """x *= scale in place, a 0-dim float32 tensor, without a pass over x if that is 1. Returns False where no kernel can."""
    if _build_failed or not _usable(x.device) or not x.is_contiguous() or scale.dtype is not torch.float32:
        return False
    from limbeck.objectives.kernels.fused_kernel import rescale_kernel

    try:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            rescale_kernel[(-(-x.numel() // _RESCALED),)](x, scale, x.numel(), BLOCK=_RESCALED)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above: nothing has been written yet
        _warn_build_failed(error)
        return False
    return True


def _readable_width(x: Tensor) -> int:
    """How many columns of a row the kernel may read and overwrite: V rounded up, if every row has memory of its own there."""
    n, vocab = x.shape
    rounded = -(-vocab // ROUND) * ROUND
    memory = int(x.untyped_storage().nbytes()) // x.element_size() - int(x.storage_offset())
    return rounded if rounded <= x.stride(0) and (n - 1) * x.stride(0) + rounded <= memory else vocab


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _usable(device: torch.device) -> bool:
    """On a GPU. On a CPU only in Triton's interpreter, for tests."""
    return _installed() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _warn_build_failed(error: Exception) -> None:
    global _build_failed
    _build_failed = True
    _warn_once(f"The kernel of the loss cannot be built here ({type(error).__name__}: {str(error)[:200]})")


def _warn_once(reason: str) -> None:
    if reason not in fallback_reasons:
        fallback_reasons.add(reason)
        warnings.warn(f"{reason}; it runs in PyTorch's own operations, with the same results.", stacklevel=4)
