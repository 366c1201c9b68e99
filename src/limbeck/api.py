"""``limbeck.distill``: a run from Python in one call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.config import load_mapping

if TYPE_CHECKING:
    from limbeck.pipeline.distill import RunResult

_SHORT = ("model_args", "training_args", "data_args")


def distill(
    student: str | Path,
    teacher: str | Path | None,
    data: str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]],
    **overrides: Any,
) -> RunResult:
    """Distil ``teacher`` into ``student`` on ``data`` and return where the better student lies.

    student, teacher: checkpoint folders or hub names; teacher None trains on the answers alone. data: a file, several
    files, or the rows themselves as dicts. Everything else is a key of ``DistillConfig``: ``max_steps=200``; a key of the
    student's training, model or data arguments may be given by its own name (``learning_rate=1e-4``), anything deeper as a
    nested dict (``teacher={"model_args": {"dtype": "bf16"}}`` is spelled ``teacher_args={...}`` here).
    """
    raise NotImplementedError
