"""The items that a source yields: a record, an undecoded line, a pretokenised document, or an unreadable row."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import LimbeckError

MAX_ROW = 1 << 24
"""Maximum size of a row in bytes. A larger one is probably a wrong file, and would be read into memory as a whole."""


class RowError(LimbeckError):
    """An error in one row. ``kind`` is a short reason by which such rows are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Record(NamedTuple):
    """One row and its location.

    line: from 1; 0 if the file has no lines. number: of the row in its list or table, from 0.
    """

    row: dict[str, Any]
    file: str
    line: int
    number: int | None = None

    @property
    def where(self) -> str:
        """``file:line``, which editors and terminals turn into a link, with the row number if there is one."""
        return place(self.file, self.line, self.number)


class Line(NamedTuple):
    """One line of a JSONL file, to be decoded later, possibly in another process."""

    raw: bytes
    file: str
    line: int


class Document(NamedTuple):
    """A pretokenised document: ``ids`` [n] of any integer type."""

    ids: NDArray[np.integer[Any]]
    file: str
    number: int

    @property
    def where(self) -> str:
        """The file and the number of the document."""
        return place(self.file, 0, self.number)


class BadRow(NamedTuple):
    """An unusable row: its location, a short reason (``kind``), and the full message (``reason``)."""

    file: str
    line: int
    number: int | None
    kind: str
    reason: str


Item: TypeAlias = Record | Line | Document | BadRow


def place(file: str, line: int, number: int | None) -> str:
    """Formats the location of a row."""
    if number is None:
        return f"{file}:{line}"
    return f"{file}:{line} (row {number})" if line else f"{file} (row {number})"


def decoded(item: Record | Line) -> Record:
    """Decodes a line to a record. Raises RowError if it is not UTF-8, not JSON, or not an object."""
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
    """The message for a byte that is not valid UTF-8."""
    return (
        f"{where} is not UTF-8 (byte 0x{byte:02x}); convert the file, "
        f"for example: iconv -f <its encoding> -t utf-8 {file}"
    )


def too_long(where: str) -> str:
    """The message for a row larger than ``MAX_ROW``."""
    return f"{where} is longer than {MAX_ROW >> 20} MiB; split it into several rows."


def object_of(row: Any, where: str) -> dict[str, Any]:
    """Returns ``row`` if it is a JSON object; raises RowError otherwise."""
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
