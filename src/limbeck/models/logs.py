"""Logging of the libraries: their progress bars would overwrite Limbeck's."""

from __future__ import annotations

import os

import torch


def configure_logging() -> None:
    """Disables the progress bars of transformers and of the hub client. Their warnings stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        # accelerate imports DeepSpeed where it is installed, which would otherwise warn about the CPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
