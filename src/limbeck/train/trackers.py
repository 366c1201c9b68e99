"""Where metrics are written. A tracker takes a step and a flat dict of numbers; ``limbeck.registry.TRACKERS`` names
them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from limbeck.errors import LimbeckError
from limbeck.registry import TRACKERS, check_members


class Tracker(Protocol):
    """Records metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` of optimizer step ``step``."""

    def close(self) -> None:
        """Everything logged is stored when this returns."""


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, appended and flushed at once, so that a killed run loses nothing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: a line that a full disk does not take must not be written again when the file is closed.
        self._file = path.open("ab", buffering=0)
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # a line that a kill cut short must not be joined with the next one

    def log(self, step: int, values: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}).encode() + b"\n"
        while line:  # a write may take a part of it
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard event files; ``log_dir_override`` replaces the run's logging folder."""

    def __init__(self, log_dir: Path, log_dir_override: str | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir_override or str(log_dir))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def make_tensorboard(log_dir: Path, kwargs: dict[str, Any]) -> Tracker:
    """The TensorBoard tracker; ``log_dir`` among ``kwargs`` replaces the run's logging folder."""
    unknown = set(kwargs) - {"log_dir"}
    if unknown:
        raise LimbeckError(f"tracker_kwargs.{min(unknown)} is not known to TensorBoard; the only key is log_dir.")
    return TensorBoard(log_dir, kwargs.get("log_dir"))


class WandB:
    """A run of Weights & Biases; ``arguments`` are those of ``wandb.init``."""

    def __init__(self, log_dir: Path, arguments: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise LimbeckError(
                "track_with: wandb needs the package wandb; install it with: pip install 'limbeck[wandb]'."
            ) from error
        log_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(dir=str(log_dir), **arguments)
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise LimbeckError(
                f"Weights & Biases cannot be used: {reason}; set WANDB_API_KEY, or WANDB_MODE=offline."
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def make_wandb(log_dir: Path, kwargs: dict[str, Any]) -> Tracker:
    """The tracker of Weights & Biases; ``kwargs`` are passed to ``wandb.init``."""
    return WandB(log_dir, kwargs)


def make_nothing(log_dir: Path, kwargs: dict[str, Any]) -> None:
    """No tracker: ``metrics.jsonl`` is written and the console prints every line anyway."""


def register_tracker(name: str, make: Callable[[Path, dict[str, Any]], Tracker | None]) -> None:
    """Make ``track_with: name`` call ``make(logging folder, tracker_kwargs)``."""
    TRACKERS.register(name)(make)


def make_tracker(name: str, log_dir: Path, kwargs: dict[str, Any]) -> Tracker | None:
    """The tracker ``name``, or None for one that keeps nothing."""
    tracker: Tracker | None = TRACKERS.get(name)(log_dir, kwargs)
    if tracker is not None:
        check_members(f"the tracker of track_with = {name}", tracker, ("log", "close"))
    return tracker
