"""Reads a run folder: the facts in ``run.json`` and the measurements in ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import LimbeckError
from limbeck.report.curves import Curve
from limbeck.report.evaluations import Evaluation, load_evaluations
from limbeck.report.written import WrittenSample, load_written


@dataclass(frozen=True)
class Run:
    """One training run.

    facts:   ``run.json``: exp_name, student, teacher, limbeck_version, parameters, config, data.
    rows:    measurements by step, in increasing order; training and validation of one step share a row.
    notices: warnings about the folder, for the report.
    samples: some written answers of the newest validation, or of the newest step.
    evaluations: results of ``limbeck eval``.
    """

    name: str
    facts: Mapping[str, Any]
    rows: Mapping[int, Mapping[str, float]]
    notices: tuple[str, ...] = ()
    samples: tuple[WrittenSample, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()

    def curve(self, key: str, label: str = "") -> Curve:
        """Returns the finite values of ``key`` over steps; empty if it was never measured."""
        points = [(step, row[key]) for step, row in self.rows.items() if math.isfinite(row.get(key, math.nan))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return Curve(label or key, np.array(steps, dtype=float), np.array(values, dtype=float))


def load_run(folder: str | Path) -> Run:
    """Reads the run in ``folder``. Raises LimbeckError if a file is missing or has no content.

    A killed run may leave an incomplete line in ``metrics.jsonl``, which is skipped with a notice. A resumed run repeats
    steps; its lines replace those of the first attempt.
    """
    folder = Path(folder)
    facts = _object(_read(folder / "run.json"))
    if facts is None:
        raise LimbeckError(
            f"{folder / 'run.json'} contains no JSON object; restore it, or use the folder of another run."
        )
    path = folder / "metrics.jsonl"
    rows: dict[int, dict[str, float]] = {}
    torn = []
    latest = -1
    for number, text in enumerate(_read(path).splitlines(), start=1):
        line = _object(text)
        step = line.get("step") if line else None
        if line is None or not isinstance(step, int):
            torn.append(number)
            continue
        if "train/loss" in line:
            if step <= latest:
                rows = {seen: row for seen, row in rows.items() if seen < step}
            latest = step
        measured = {key: float(value) for key, value in line.items() if isinstance(value, (int, float))}
        rows.setdefault(step, {}).update(measured)
    if not rows:
        raise LimbeckError(f"{path} contains no measurement; wait for the first logged step, or use another folder.")
    rows = dict(sorted(rows.items()))
    name = str(facts.get("exp_name") or folder.name)
    return Run(name, facts, rows, tuple(_notices(rows, torn)), load_written(folder), load_evaluations(folder))


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads several runs. If two have the same name, all are called after their folders."""
    runs, names = [load_run(folder) for folder in folders], [Path(folder).name for folder in folders]
    if len({run.name for run in runs}) == len(runs):
        return runs
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _notices(rows: Mapping[int, Mapping[str, float]], torn: list[int]) -> Iterator[str]:
    if torn:
        where = ", ".join(map(str, torn[:5])) + (", ..." if len(torn) > 5 else "")
        yield f"metrics.jsonl has {len(torn)} incomplete or unreadable lines (line {where}); they are skipped."
    for key in ("train/loss", "val/loss"):
        lost = [step for step, row in rows.items() if not math.isfinite(row.get(key, 0.0))]
        if lost:
            yield f"{key} is not a finite number at {len(lost)} logged steps, first at step {lost[0]}."


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LimbeckError(
            f"{path} cannot be read ({error.strerror}); use the output_dir of a run: "
            "a folder with run.json and metrics.jsonl."
        ) from error


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
