"""Columns of one source under other names, for sources whose question and answer have other columns than those of the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from limbeck.data.sources.items import BadRow, Item, Line, Record, RowError, decoded

NEMO_RL_KEYS = {"question_key": "input_key", "answer_key": "output_key"}
"""Keys of the columns, and their names in a configuration of NeMo-RL."""


def with_columns(items: Iterable[Item], columns: Mapping[str, str]) -> Iterator[Item]:
    """Yields the items, with values of each record also under another key; numbers become text.

    columns: new key -> key in the row, or a path into nested values, such as ``reward_model.ground_truth`` or
             ``prompt.0.content``. A record without one is a BadRow.
    """
    for item in items:
        if not isinstance(item, (Line, Record)):
            yield item
            continue
        try:
            record = decoded(item)
            found = {key: _value(record, path) for key, path in columns.items()}
        except RowError as error:
            number = item.number if isinstance(item, Record) else None
            yield BadRow(item.file, item.line, number, error.kind, str(error))
        else:
            yield record._replace(row={**record.row, **found})


def _value(record: Record, path: str) -> Any:
    value: Any = record.row
    if path in record.row:  # a column whose name contains a dot
        value = record.row[path]
    else:
        for part in path.split("."):
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                columns = ", ".join(str(name)[:40] for name in list(record.row)[:20])
                raise RowError(
                    "missing key",
                    f'{record.where} has no "{path}" (its columns are {columns}); correct the question_key or answer_key of '
                    f"the source ({' or '.join(NEMO_RL_KEYS.values())} in the form of NeMo-RL).",
                )
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
