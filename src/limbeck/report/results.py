"""The results at the top of a report: a table of metrics, and the answers of each model to some questions.

The evaluation code fills these in; this module renders them as HTML.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Literal

from limbeck.report.charts import number, percent


@dataclass(frozen=True)
class ResultRow:
    """One metric: ``values`` [columns] in the order of the table, None where it was not measured."""

    label: str
    values: tuple[float | None, ...]
    better: Literal["higher", "lower"]
    note: str = ""
    percent: bool = False


@dataclass(frozen=True)
class ResultTable:
    """Metrics by model. The best value of each row is marked; the column ``reference`` is excluded."""

    columns: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    reference: str | None = None


@dataclass(frozen=True)
class Answer:
    """The answer of the model ``name``, and whether it is correct."""

    name: str
    text: str
    correct: bool


@dataclass(frozen=True)
class Sample:
    """A question, the expected answer, and the answers of the models."""

    question: str
    expected: str
    answers: tuple[Answer, ...]


def table_html(table: ResultTable) -> str:
    """Renders the table in a card."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in ("", *table.columns))
    body = "".join(f"<tr>{''.join(_cells(row, table))}</tr>" for row in table.rows)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(row: ResultRow, table: ResultTable) -> Iterator[str]:
    contenders = [
        value
        for column, value in zip(table.columns, row.values, strict=True)
        if value is not None and column != table.reference
    ]
    best = (max if row.better == "higher" else min)(contenders, default=None)
    show = percent if row.percent else number
    note = f"<small>{escape(row.note)}</small>" if row.note else ""
    yield f'<th scope="row">{escape(row.label)}{note}</th>'
    for column, value in zip(table.columns, row.values, strict=True):
        text = "–" if value is None else show(value)
        if column == table.reference:
            yield f'<td class="reference">{text}</td>'
        elif value is not None and value == best and len(contenders) > 1:
            yield f'<td class="best">{text}</td>'
        else:
            yield f"<td>{text}</td>"


def sample_html(sample: Sample) -> str:
    """Renders one question in a card, with the expected answer first."""
    lines = [f"<div><dt>Expected</dt><dd>{escape(sample.expected)}</dd></div>"]
    for answer in sample.answers:
        verdict = "right" if answer.correct else "wrong"
        lines.append(
            f"<div><dt>{escape(answer.name)}</dt><dd>{escape(answer.text)}</dd>"
            f'<span class="verdict {verdict}">{verdict}</span></div>'
        )
    return f'<div class="card sample"><p>{escape(sample.question)}</p><dl>{"".join(lines)}</dl></div>'
