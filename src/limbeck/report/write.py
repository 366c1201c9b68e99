"""Writes a report: the results first, then the curves, then data and configuration.

A report of one run shows related quantities in one chart (loss, cross-entropy, distillation). A report of several runs shows
one quantity per chart, with one curve per run. All text from outside is escaped here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.report.charts import SERIES, Level, area_chart, line_chart, number, percent
from limbeck.report.curves import Curve
from limbeck.report.evaluations import evaluations_html
from limbeck.report.page import page
from limbeck.report.results import ResultTable, Sample, sample_html, table_html
from limbeck.report.run import Run
from limbeck.report.written import written_html


@dataclass(frozen=True)
class _Panel:
    title: str
    caption: str
    curves: tuple[tuple[str, str], ...]
    show: Callable[[float], str] = number
    log: bool = False
    from_zero: bool = False


_LEARNING = (
    _Panel(
        "Validation loss",
        "Nats per supervised token, on data not trained on.",
        (("val/loss", "total"), ("val/ce", "cross-entropy"), ("val/kd", "distillation")),
        log=True,
    ),
    _Panel(
        "Training loss",
        "Nats per supervised token.",
        (
            ("train/loss", "total"),
            ("train/train_student_loss", "cross-entropy"),
            ("train/train_distill_loss", "distillation"),
        ),
        log=True,
    ),
    _Panel(
        "Agreement",
        "How often student and teacher have the same most likely token.",
        (("train/top1_agreement", "training"), ("val/top1_agreement", "validation")),
        show=percent,
    ),
    _Panel(
        "Entropy",
        "Nats per token; the uncertainty of each model.",
        (("train/student_entropy", "student"), ("train/teacher_entropy", "teacher")),
    ),
    _Panel(
        "Accuracy of written answers",
        "Mean reward of the student's answers: to validation prompts, and to training prompts.",
        (("val/accuracy", "validation"), ("rollout/reward", "training")),
    ),
    _Panel("Gradient norm", "Before clipping.", (("student/grad_norm", "gradient norm"),), log=True),
    _Panel("Learning rate", "Set by the schedule.", (("student/lr", "learning rate"),), from_zero=True),
)
_WORKING = (
    _Panel("Throughput", "Tokens per second.", (("train/tokens_per_second", "tokens per second"),), from_zero=True),
    _Panel("Padding", "Share of padding in a batch.", (("train/padding_share", "padding"),), percent, False, True),
)
_WEIGHTED = ("val/loss", "train/loss")  # sums whose weights may differ between runs, so they are not compared
_TIMES = tuple((f"time/{part}", part) for part in ("data", "teacher", "student", "optimizer", "rollout", "weight_sync"))
_SECRET = re.compile(r"secret|password|credential|api_?key|(^|_)token$", re.IGNORECASE)


def write_report(
    runs: Sequence[Run],
    path: str | Path,
    *,
    title: str,
    summary: str | None = None,
    table: ResultTable | None = None,
    samples: Sequence[Sample] = (),
    levels: Sequence[Level] = (),
) -> Path:
    """Writes one self-contained HTML file and returns its path. Creates missing folders.

    runs: with distinct names, as ``load_runs`` gives them.
    levels: values drawn as dashed lines in the charts of their key, such as the teacher's ``val/ce``.
    """
    version = next((run.facts["limbeck_version"] for run in runs if "limbeck_version" in run.facts), None)
    written = [
        (f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 and number == 0 else "") + written_html(sample)
        for run in runs
        for number, sample in enumerate(run.samples)
    ]
    evaluated = evaluations_html([(_of(run, runs), run.evaluations) for run in runs])
    parts = [
        f'<header><div class="eyebrow">{escape(f"Limbeck {version}" if version else "Limbeck")}</div>'
        f"<h1>{escape(title)}</h1>",
        f'<p class="summary">{escape(summary)}</p>' if summary else "",
        *(f'<p class="notice">{escape(_of(run, runs))}{escape(notice)}</p>' for run in runs for notice in run.notices),
        "</header>",
        _cards(runs[0]) if len(runs) == 1 else "",
        _section("Result", [table_html(table)]) if table else "",
        _section("Evaluation", [evaluated]) if evaluated else "",
        _section("Samples", [*map(sample_html, samples), *written]) if samples or written else "",
        _section("Learning", _grid(_charts(_LEARNING, runs, levels))),
        _section("Time and throughput", _grid([*_charts(_WORKING, runs, levels), *_times(runs)])),
        _section("Runs", [_comparison(runs)]) if len(runs) > 1 else "",
        _section("Data and configuration", (_origin(run, runs) for run in runs)),
        "<footer>The value next to each name is its last value. For a long curve, the bold line is the mean of "
        "neighbouring steps, and the pale line shows their extremes.</footer>",
    ]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(title, "\n".join(part for part in parts if part), series=SERIES), encoding="utf-8")
    return target


def _section(title: str, parts: Iterable[str]) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


@dataclass(frozen=True)
class _Fact:
    label: str
    value: str
    note: str = ""

    def html(self) -> str:
        return escape(self.value) + (f"<small>{escape(self.note)}</small>" if self.note else "")


def _facts(run: Run) -> list[_Fact]:
    """The same facts in the same order for every run; a dash for an unknown value."""
    loss, ce, validation = run.curve("train/loss"), run.curve("train/train_student_loss"), run.curve("val/loss")
    tokens, speed = run.curve("train/tokens"), run.curve("train/tokens_per_second")
    memory, seconds = run.curve("system/peak_memory_gb"), run.curve("time/step")
    steps = max(run.rows)
    lowest = int(validation.values.argmin()) if len(validation) else 0
    return [
        _model(run, "student"),
        _model(run, "teacher"),
        _Fact("Steps", number(steps), f"{np.median(seconds.values):.3g} s each" if len(seconds) else ""),
        _Fact("Tokens", number(tokens.values.sum()) if len(tokens) else "–", "seen in training"),
        _Fact("Training loss", _last(loss), f"cross-entropy {_last(ce)}" if len(ce) else ""),
        _Fact(
            "Validation loss",
            _last(validation),
            f"lowest {number(validation.values[lowest])} at step {number(validation.steps[lowest])}"
            if len(validation)
            else "",
        ),
        _Fact("Tokens per second", number(np.median(speed.values)) if len(speed) else "–", "median"),
        _Fact("Peak memory", f"{memory.values.max():.3g} GB" if len(memory) else "–"),
    ]


def _model(run: Run, role: str) -> _Fact:
    name = run.facts.get(role)
    size = run.facts.get("parameters", {}).get(role)
    return _Fact(
        role.capitalize(),
        Path(str(name)).name if name else "none",
        f"{number(size)} parameters" if isinstance(size, int) else "",
    )


def _last(curve: Curve) -> str:
    return number(curve.values[-1]) if len(curve) else "–"


def _cards(run: Run) -> str:
    facts = (f"<div><dt>{fact.label}</dt><dd>{fact.html()}</dd></div>" for fact in _facts(run))
    return f'<dl class="card facts">{"".join(facts)}</dl>'


def _comparison(runs: Sequence[Run]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *(run.name for run in runs)))
    rows = (
        f'<tr><th scope="row">{facts[0].label}</th>{"".join(f"<td>{fact.html()}</td>" for fact in facts)}</tr>'
        for facts in zip(*map(_facts, runs), strict=True)
    )
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _grid(charts: Iterable[str]) -> Iterator[str]:
    yield f'<div class="charts">{"".join(charts)}</div>'


def _charts(panels: Sequence[_Panel], runs: Sequence[Run], levels: Sequence[Level]) -> Iterator[str]:
    for panel in panels:
        if len(runs) == 1:
            keys = [key for key, _ in panel.curves]
            yield from _lines(panel, panel.title, [runs[0].curve(*pair) for pair in panel.curves], keys, levels)
            continue
        for key, label in panel.curves:
            if key not in _WEIGHTED:
                title = panel.title if len(panel.curves) == 1 else f"{panel.title}: {label}"
                yield from _lines(panel, title, [run.curve(key, run.name) for run in runs], [key], levels)


def _lines(
    panel: _Panel, title: str, curves: Sequence[Curve], keys: Sequence[str], levels: Sequence[Level]
) -> Iterator[str]:
    if not any(len(curve) for curve in curves):
        return
    drawn = line_chart(
        title,
        curves,
        levels=[level for level in levels if level.key in keys],
        show=panel.show,
        log=panel.log,
        from_zero=panel.from_zero,
    )
    entries = [(index, curve.label, panel.show(curve.values[-1])) for index, curve in enumerate(curves) if len(curve)]
    yield _figure(title, panel.caption, entries, drawn)


def _times(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        curves = [run.curve(*pair) for pair in _TIMES]
        measured = [curve for curve in curves if curve.values.any()]
        steps = reduce(np.intersect1d, [curve.steps for curve in measured]) if measured else np.array([])
        if not len(steps):
            continue
        stacked = [curve.at(steps if curve.values.any() else steps[:0]) for curve in curves]
        whole = sum(curve.values.mean() for curve in measured)
        entries = [(i, c.label, percent(c.values.mean() / whole)) for i, c in enumerate(stacked) if len(c)]
        title = f"Time of a step: {run.name}" if len(runs) > 1 else "Time of a step"
        yield _figure(title, "Seconds, and each part's share of the run.", entries, area_chart(title, stacked))


def _figure(title: str, caption: str, entries: Iterable[tuple[int, str, str]], drawn: str) -> str:
    """One chart in a card; each entry of its legend is (series, label, value)."""
    legend = "".join(
        f'<li><i class="s{index % SERIES + 1}"></i>{escape(label)} <b>{value}</b></li>'
        for index, label, value in entries
    )
    return (
        f'<figure class="card"><h3>{escape(title)}</h3><p class="caption">{caption}</p>'
        f'<ul class="legend">{legend}</ul>{drawn}</figure>'
    )


def _origin(run: Run, runs: Sequence[Run]) -> str:
    """The run's data and, collapsed, its resolved configuration."""
    data = run.facts.get("data")
    config = json.dumps(_without_secrets(run.facts.get("config", {})), indent=2, ensure_ascii=False)
    return (
        (f"<p>{escape(_of(run, runs) + str(data))}</p>" if data else "")
        + f'<details class="card"><summary>{escape(_of(run, runs))}resolved configuration</summary>'
        f"<pre>{escape(config)}</pre></details>"
    )


def _without_secrets(value: Any) -> Any:
    """Removes keys and passwords from a configuration, because reports are shared."""
    if isinstance(value, dict):
        return {
            key: "(left out)" if _SECRET.search(str(key)) and inner else _without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    return value
