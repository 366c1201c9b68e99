"""Results of evaluations, as files beside a run: ``eval/<task>--<model>.json``, which the report of the run shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.version import VERSION

FOLDER = "eval"


@dataclass(frozen=True)
class Result:
    """One model on one task.

    metrics: by name. settings: what the metrics depend on. answers: of the model, if they were kept.
    """

    task: str
    model: str
    metrics: Mapping[str, float]
    settings: Mapping[str, Any]
    seconds: float
    answers: Sequence[Mapping[str, Any]] = ()


def save_result(result: Result, folder: Path) -> Path:
    """Write a result into ``folder``, in place of an earlier one of the same task and model, and its answers beside it as
    JSON lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = "--".join(re.sub(r"[^\w.-]+", "-", part) for part in (result.task, result.model))
    path = folder / f"{name}.json"
    content = {
        "task": result.task,
        "model": result.model,
        "metrics": dict(result.metrics),
        "settings": dict(result.settings),
        "seconds": round(result.seconds, 3),
        "limbeck_version": VERSION,
    }
    if result.answers:
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in result.answers)
        path.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
