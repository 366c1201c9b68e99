"""Keep a training process's freed memory for its next allocation of the same size.

glibc hands every large buffer back to the kernel when it is freed and gets it again, page by page and zeroed, a moment
later. A training step makes the same buffers over and over, so on a CPU that costs as much as the arithmetic on them.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_pages() -> bool:
    """Tell glibc's allocator to keep what is freed; returns whether there was a glibc to tell."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
