"""What a source yields, row by row: a record, a line not yet decoded, ready-made tokens, or a row that cannot be read.

How files are opened is not known here.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import LimbeckError

MAX_ROW = 1 << 24
"""Bytes of the longest row that is read. More is no row but a file in the wrong place, and would be read into memory whole."""


class RowError(LimbeckError):
    """What is wrong with one row. ``kind`` is the reason in a few words, by which such rows are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Record(NamedTuple):
    """One row and where it was read, so that whatever is wrong with it can be named.

    line: from 1, or 0 where the file has no lines. number: the row's, in its list or table, from 0.
    """

    row: dict[str, Any]
    file: str
    line: int
    number: int | None = None

    @property
    def where(self) -> str:
        """``file:line``, the form that editors and terminals turn into a link, or the row's number where that says more."""
        return place(self.file, self.line, self.number)


class Line(NamedTuple):
    """One line of a JSONL file, decoded later, possibly by another process."""

    raw: bytes
    file: str
    line: int


class Document(NamedTuple):
    """A document that is already tokens: ``ids`` [n] of any integer type."""

    ids: NDArray[np.integer[Any]]
    file: str
    number: int

    @property
    def where(self) -> str:
        """The file and the document's number in it."""
        return place(self.file, 0, self.number)


class BadRow(NamedTuple):
    """A row that cannot be used: where it is, the reason in a few words, and as a sentence."""

    file: str
    line: int
    number: int | None
    kind: str
    reason: str


Item: TypeAlias = Record | Line | Document | BadRow


def place(file: str, line: int, number: int | None) -> str:
    """A row's place in words."""
    if number is None:
        return f"{file}:{line}"
    return f"{file}:{line} (row {number})" if line else f"{file} (row {number})"


def decoded(item: Record | Line) -> Record:
    """The record in a line. Raises RowError for one that is not UTF-8, not JSON, or not an object."""
    if isinstance(item, Record):
        return item
    where = f"{item.file}:{item.line}"
    try:
        text = item.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", not_utf8(where, item.raw[error.start], item.file)) from error
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowError(
            "not valid JSON",
            f"{where} is not valid JSON ({what}); write one complete JSON object on each line, "
            "or put all objects into one JSON list in a .json file.",
        ) from error
    return Record(object_of(row, where), item.file, item.line)


def not_utf8(where: str, byte: int, file: str) -> str:
    """The sentence for a byte that begins no character."""
    return (
        f"{where} is not UTF-8 (byte 0x{byte:02x}); convert the file, "
        f"for example: iconv -f <its encoding> -t utf-8 {file}"
    )


def too_long(where: str) -> str:
    """The sentence for a row beyond ``MAX_ROW``."""
    return f"{where} is longer than {MAX_ROW >> 20} MiB; a row is one document, so split it into several."


def object_of(row: Any, where: str) -> dict[str, Any]:
    """``row`` if it is a JSON object; raises RowError otherwise."""
    if not isinstance(row, dict):
        raise RowError(
            "not an object",
            f"{where} holds a JSON {_JSON_NAMES[type(row)]}, not an object; "
            'each row must look like {"question": "…", "answer": "…"}.',
        )
    return row


_JSON_NAMES = {
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}
