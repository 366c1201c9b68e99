"""The pass over a tile of logits (``rows``) as a Triton kernel, for the dense case: whole vocabularies on both sides.

``kernel_pass`` says whether there is one; where there is none, ``rows`` does the same work by other means. Knows the pass's
arguments and nothing of chunks or heads.
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

from limbeck.objectives.elementwise import STATS, Pass, Rows, Spec
from limbeck.objectives.kernels.source import Translation, Untranslatable, translate
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabReducer

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK, WARPS = 2048, 8  # eight logits per thread: one load of 16 bytes in half precision
ROUND = 16  # elements; Triton reads whole vectors only where it can tell that a row ends at a multiple of this

_told: set[str] = set()


def kernel_pass(
    spec: Spec, across: VocabReducer, device: torch.device
) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """A function (plain pass, ``Rows``) → (stats, bias's gradient), or None where there is no kernel for ``spec``.

    DivergenceFn that Triton cannot express, and kernels that cannot be built on this machine, are told of once. The bias's
    gradient sums what was stored, in float32.
    """
    if not _usable(device) or across is not NO_SHARDING or spec.dtype is not torch.float32 or spec.sampled or spec.topk:
        return None
    try:
        translation = translate(spec.terms)
    except Untranslatable as why:
        _tell(f"This divergence has no kernel, because {why}")
        return None

    def run(plain: Pass, rows: Rows) -> tuple[Tensor, Tensor | None]:
        if "build" in _told:
            return plain(*rows)
        try:
            return launch(rows, spec, translation)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, an unknown device: nothing has been written yet
            _told.add("build")
            _tell(f"The kernel of the loss cannot be built here ({type(error).__name__}: {str(error)[:200]})")
            return plain(*rows)

    return run


def launch(rows: Rows, spec: Spec, translation: Translation) -> tuple[Tensor, Tensor | None]:
    """Run the kernel on a tile; see ``rows.elementwise_pass`` for what comes back."""
    from limbeck.objectives.kernels.fused_kernel import sweep

    n, vocab = rows.z.shape
    stats = torch.zeros(n, len(STATS), dtype=torch.float32, device=rows.z.device)
    w, tau = spec.kd_weight, spec.temperature
    known = w == 0 or translation.mass is not None
    with torch.cuda.device(rows.z.device) if rows.z.is_cuda else nullcontext():
        sweep[(n,)](
            rows.z,
            rows.bias,
            rows.teacher,
            rows.teacher_bias,
            rows.target,
            rows.weight,
            rows.factor,
            stats,
            vocab,
            rows.z.stride(0),
            0 if rows.teacher is None else rows.teacher.stride(0),
            _edge(rows.z),
            0 if rows.teacher is None else _edge(rows.teacher),
            1 / tau,
            1 / spec.teacher_temperature,
            (1 - w) * spec.scale,
            w * (tau if spec.squared else 1 / tau) * spec.scale,
            float(translation.mass or 0.0) if w else 0.0,
            terms=translation.terms,
            z_scale=spec.scale,
            z_cap=spec.softcap,
            t_scale=spec.teacher_scale,
            t_cap=spec.teacher_softcap,
            TEMPERED=tau != 1,
            GRADIENT=spec.wants_grad,
            MASS_KNOWN=known,
            STATS=len(STATS),
            BLOCK=min(BLOCK, 1 << (vocab - 1).bit_length()),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    bias = rows.z.sum(0, dtype=torch.float32) if spec.wants_grad and rows.bias is not None else None
    return stats.sum(0), bias


def _edge(x: Tensor) -> int:
    """How many columns of a row may be read and, in the student's, overwritten: rounded up where rows and memory allow."""
    n, vocab = x.shape
    rounded = -(-vocab // ROUND) * ROUND
    memory = int(x.untyped_storage().nbytes()) // x.element_size() - int(x.storage_offset())
    return rounded if rounded <= x.stride(0) and (n - 1) * x.stride(0) + rounded <= memory else vocab


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _usable(device: torch.device) -> bool:
    """On a GPU, and on a CPU in Triton's interpreter, which is for tests."""
    return _installed() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _tell(what: str) -> None:
    if what not in _told:
        _told.add(what)
        warnings.warn(f"{what}; it runs in PyTorch's own operations, with the same results.", stacklevel=4)
