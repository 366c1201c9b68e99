"""Environment variables of worker processes. A Ray that was started elsewhere does not pass on those of this process."""

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
)


def worker_environment(configured: Mapping[str, str], workers: int) -> dict[str, str]:
    """Variables for each of ``workers`` processes: selected ones of this process, a share of the cores, and
    ``configured`` last.
    """
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))}
    # Ray writes these variables into its logs, so no token may be among them.
    passed = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON) and "TOKEN" not in k}
    return {**threads, **passed, **configured}
