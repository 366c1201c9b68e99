"""``torch.compile`` for the elementwise pass: when it is used, and what runs if it fails."""

from __future__ import annotations

import os
import shutil
import warnings
from functools import cache

import torch
from torch import Tensor

from limbeck.objectives.elementwise import ElementwiseSpec, Pass, TileInputs, elementwise_pass
from limbeck.objectives.vocab_parallel import VocabReducer

_WORTH_COMPILING = 1 << 24  # logits in a call; a smaller call does not soon repay seconds of compilation


def should_compile(logits: int) -> bool:
    """Whether a call over so many logits compiles its elementwise pass by default."""
    return logits >= _WORTH_COMPILING and compiler_found()


@cache
def compiler_found() -> bool:
    """Whether the elementwise pass can be compiled on this machine. ``LIMBECK_COMPILE=0`` disables it."""
    if os.environ.get("LIMBECK_COMPILE", "1") == "0":
        return False
    return torch.cuda.is_available() or any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


class CompiledPass:
    """Runs the compiled elementwise pass. Runs the plain pass for a single row, and always after a compilation has failed."""

    failed = False

    def __init__(self, spec: ElementwiseSpec, reducer: VocabReducer) -> None:
        self._pass = elementwise_pass(spec, reducer, True)

    def __call__(self, plain: Pass, tile: TileInputs) -> tuple[Tensor, Tensor | None]:
        if CompiledPass.failed or tile.target.numel() == 1:  # dynamo would specialize on one row
            return plain(*tile)
        for name, tensor in tile._asdict().items():
            if tensor is not None and name not in ("bias", "teacher_bias", "factor"):  # a row for each position
                torch._dynamo.mark_dynamic(tensor, 0)
        try:
            return self._pass(*tile)
        except torch._dynamo.exc.TorchDynamoException as error:
            CompiledPass.failed = True
            warnings.warn(
                f"The elementwise part of the loss could not be compiled ({type(error).__name__}); it runs uncompiled, "
                "which is slower and gives the same results.",
                stacklevel=2,
            )
            return plain(*tile)
