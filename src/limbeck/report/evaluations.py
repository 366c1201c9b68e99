"""Results of ``limbeck eval``, from ``eval/*.json`` in a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.report.charts import number
from limbeck.report.results import ResultRow, ResultTable, table_html

_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "ter")
_DETAILS = ("unscored_share", "truncated_share", "mean_length")
_ERROR = "_stderr"


@dataclass(frozen=True)
class Evaluation:
    """One model on one task. settings: what the metrics depend on."""

    task: str
    model: str
    metrics: Mapping[str, float]
    settings: Mapping[str, Any]


def load_evaluations(folder: Path) -> tuple[Evaluation, ...]:
    """Returns the results in a run folder by task and model; files of something else are left out."""
    found = []
    for path in sorted((folder / "eval").glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            metrics = {str(name): float(value) for name, value in content["metrics"].items()}
            found.append(Evaluation(str(content["task"]), str(content["model"]), metrics, dict(content["settings"])))
        except (ValueError, KeyError, TypeError, AttributeError):  # not written by limbeck eval
            continue
    return tuple(found)


def evaluations_html(runs: Sequence[tuple[str, Sequence[Evaluation]]]) -> str:
    """Renders a table with a row for each metric and a column for each model; empty if there is no result.

    runs: prefix of the names of the models, and results of each run.
    """
    columns: dict[str, None] = {}
    cells: dict[tuple[str, str, str], dict[str, tuple[float, float | None]]] = {}
    for prefix, evaluations in runs:
        for one in evaluations:
            column = f"{prefix}{one.model}"
            columns[column] = None
            for name, value in one.metrics.items():
                if _ERROR not in name and name not in _DETAILS:
                    row = cells.setdefault((one.task, name, _note(one)), {})
                    row[column] = value, one.metrics.get(_error_of(name))
    rows = [
        ResultRow(
            f"{task}: {name}",
            tuple(values[column][0] if column in values else None for column in columns),
            "lower" if name.startswith(_LOWER_IS_BETTER) else "higher",
            ", ".join(filter(None, (note, _errors([values[column][1] for column in columns if column in values])))),
            percent=name.startswith(("acc", "exact_match")),
        )
        for (task, name, note), values in cells.items()
    ]
    return table_html(ResultTable(tuple(columns), tuple(rows))) if rows else ""


def _error_of(name: str) -> str:
    """lm-eval writes the standard error of ``acc,none`` as ``acc_stderr,none``."""
    metric, comma, kind = name.partition(",")
    return f"{metric}{_ERROR}{comma}{kind}"


def _errors(errors: Sequence[float | None]) -> str:
    known = [number(error) for error in errors if error is not None]
    return f"standard error {', '.join(known)}" if known else ""


def _note(one: Evaluation) -> str:
    settings = one.settings
    if "questions" in settings:
        answers = f" × {settings['samples']} answers" if settings.get("samples", 1) != 1 else ""
        return f"{settings['questions']} questions{answers}, verifier {settings.get('verifier')}"
    shots, limit = settings.get("num_fewshot"), settings.get("limit")
    return ", ".join(
        ["lm-eval"] + ([] if shots is None else [f"{shots} shots"]) + ([] if limit is None else [f"first {limit}"])
    )
