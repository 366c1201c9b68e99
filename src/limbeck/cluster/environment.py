"""The environment of a worker's process, which a Ray that was joined would not pass on by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

_PASSED_ON = (
    "HF_",
    "LIMBECK_",
    "TRANSFORMERS_",
    "TORCH",
    "NCCL_",
    "GLOO_",
    "XDG_CACHE_HOME",
)  # a joined Ray has others


def worker_environment(configured: Mapping[str, str], workers: int) -> dict[str, str]:
    """What this process has and a worker needs, a worker's share of the cores, and above all what is ``configured``."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))}
    # Ray writes what it passes on into its logs, where a token must not be.
    passed = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON) and "TOKEN" not in k}
    return {**threads, **passed, **configured}
