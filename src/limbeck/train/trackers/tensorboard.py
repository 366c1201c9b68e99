"""The tracker ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError


class TensorBoard:
    """Writes event files to ``log_dir`` of ``kwargs``, or else to the run's logging folder."""

    def __init__(self, log_dir: Path, kwargs: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if unknown := set(kwargs) - {"log_dir"}:
            raise LimbeckError(f"tracker_kwargs.{min(unknown)} is not known to TensorBoard; the only key is log_dir.")
        self._writer: Any = SummaryWriter(kwargs.get("log_dir") or str(log_dir))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
