"""What the libraries print: progress bars that would overwrite Limbeck's, and warnings that are not for users."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import torch

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = r"(torch|deepspeed|transformers|accelerate|torchao)(\.|$)"

# Transformers imports torchao where it is installed. That warns, before anything can be configured, about its libraries for
# GPUs and about how it registers enumerations.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def configure_logging() -> None:
    """Disables the progress bars of transformers and of the hub client, and warnings of libraries about their own future.

    Limbeck's own warnings become one line without the place in its code.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not torch.cuda.is_available():
        # accelerate imports DeepSpeed where it is installed, which would otherwise warn about the CPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    warnings.formatwarning = _format_warning


_format_others = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if filename.startswith(_PACKAGE):
        return f"note: {message}\n"
    return _format_others(message, category, filename, lineno, line)
