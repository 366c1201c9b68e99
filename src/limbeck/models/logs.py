"""One bar at a time: the libraries' own progress bars would write over ours."""

from __future__ import annotations

import os

import torch


def configure_logging() -> None:
    """Switch off the progress bars of transformers and the hub client; their warnings stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if (
        not torch.cuda.is_available()
    ):  # else DeepSpeed, which accelerate imports where it is installed, warns of the CPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
