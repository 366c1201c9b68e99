"""Free memory, and out-of-memory errors as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from limbeck.errors import LimbeckError


def available_memory() -> int | None:
    """Bytes of memory, swap included, that a process may still allocate; None where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return 1024 * (kilobytes["MemAvailable"] + kilobytes["SwapFree"])


@contextmanager
def explain_oom(doing: str, remedy: str) -> Iterator[None]:
    """Turn an allocation that fails inside the block into a LimbeckError: "out of memory while ``doing``;
    ``remedy``".
    """
    try:
        yield
    except RuntimeError as error:
        # CUDA has an exception class for it, the CPU's allocator does not.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        detail = str(error).strip().splitlines()[0]
        raise LimbeckError(f"out of memory while {doing} ({detail}); {remedy}.") from error
