"""Reads rows from text files: JSONL, one JSON list, CSV and TSV, optionally compressed with gzip or zstandard.

Files are read from start to end; only one row and a buffer are in memory.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from limbeck.data.sources.items import (
    MAX_ROW,
    BadRow,
    Item,
    Line,
    Record,
    RowError,
    not_utf8,
    object_of,
    place,
    too_long,
)
from limbeck.errors import LimbeckError

_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20


def read_json(path: Path) -> Iterator[Item]:
    """Yields the rows of a JSON list of objects. A file that does not begin with ``[`` is read as JSONL."""
    with _opened(path) as file:
        while (head := file.read(1)) and head in b" \t\r\n" + _BOM:
            pass
    if head == b"[":
        yield from _read_list(path)
    else:
        yield from read_lines(path)


def read_lines(path: Path) -> Iterator[Item]:
    """Yields one JSON object per line and skips blank lines."""
    with _opened(path) as file:
        number = 0
        while raw := file.readline(MAX_ROW + 1):
            number += 1
            if number == 1:
                raw = raw.removeprefix(_BOM)
            if len(raw) > MAX_ROW:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(_BLOCK)
                yield BadRow(str(path), number, None, "too long", too_long(f"{path}:{number}"))
            elif not raw.isspace() and raw:
                yield Line(raw, str(path), number)


def read_csv(path: Path, delimiter: str) -> Iterator[Item]:
    """Yields the rows of a table whose first row names the columns. Every value is text."""
    csv.field_size_limit(MAX_ROW)
    with _opened(path) as file:
        # Invalid UTF-8 becomes a surrogate, so that only its row is bad.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        index = -1
        while True:
            begun = rows.line_num + 1
            try:
                values = next(rows, None)
            except csv.Error as error:
                if "unexpected end of data" in str(error):  # an unclosed quote that includes all following rows
                    raise LimbeckError(
                        f"{path}:{begun} opens a quote that is never closed, so the rows after it cannot be separated; "
                        "close it, or double a quote that is a character of the text."
                    ) from error
                if names is None:
                    raise LimbeckError(f"{path}:{rows.line_num} is not a CSV header ({error}); correct it.") from error
                index += 1
                where = place(str(path), rows.line_num, index)
                yield BadRow(str(path), rows.line_num, index, "not CSV", f"{where} is not CSV ({error}); correct it.")
                continue
            if values is None:
                return
            if names is None:
                names = values
                if len(set(names)) < len(names):
                    raise LimbeckError(f"{path} names a column twice ({', '.join(names)}); give each its own name.")
                continue
            if not values:
                continue
            index += 1
            where = place(str(path), rows.line_num, index)
            wrong = (
                next((v for v in values if any("\udc80" <= c <= "\udcff" for c in v)), None)
                if not _clean(values)
                else None
            )
            if wrong is not None:
                byte = next(ord(c) - 0xDC00 for c in wrong if "\udc80" <= c <= "\udcff")
                yield BadRow(str(path), rows.line_num, index, "not UTF-8", not_utf8(where, byte, str(path)))
            elif len(values) != len(names):
                sentence = f"{where} has {len(values)} values for {len(names)} columns; check its quotes and commas."
                yield BadRow(str(path), rows.line_num, index, "not CSV", sentence)
            else:
                yield Record(dict(zip(names, values, strict=True)), str(path), rows.line_num, index)


def _clean(values: list[str]) -> bool:
    try:
        "".join(values).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_list(path: Path) -> Iterator[Item]:
    """Decodes a JSON list item by item, so that errors name the row and its line."""
    with _opened(path) as file:
        window = _Window(file, path)
        window.skip_blank()
        window.at += 1
        index = 0
        window.skip_blank()
        while not window.begins("]"):
            line = window.line
            where = place(str(path), line, index)
            try:
                row = window.decode(index, line)
                yield Record(object_of(row, where), str(path), line, index)
            except RowError as error:
                yield BadRow(str(path), line, index, error.kind, str(error))
            index += 1
            window.skip_blank()
            if window.begins(","):
                window.at += 1
                window.skip_blank()
            elif not window.begins("]"):
                raise LimbeckError(
                    f"{path}:{window.line} is not valid JSON (expected ',' or ']' after row {index - 1} of the list); "
                    "the file may have been cut off."
                )
        window.at += 1
        window.skip_blank()
        if not window.at_end:
            raise LimbeckError(
                f"{path}:{window.line} has text after the end of the list; keep one list of objects in the file."
            )


class _Window:
    """A buffer of a text file that begins at the current row."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._whole = False
        self._counted = 0  # newlines before this index are counted in _line
        self._line = 1
        self._lines_read = 1
        self.at = 0

    @property
    def line(self) -> int:
        self._line += self._text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    @property
    def at_end(self) -> bool:
        return self.at >= len(self._text)

    def begins(self, character: str) -> bool:
        return self._text.startswith(character, self.at)

    def skip_blank(self) -> None:
        while True:
            while self.at < len(self._text) and self._text[self.at] in " \t\r\n":
                self.at += 1
            if not self.at_end or self._whole:
                return
            self._more()

    def decode(self, index: int, line: int) -> Any:
        """Decodes the JSON value at the current index. Invalid JSON ends the file, because the next row cannot be found."""
        while True:
            try:
                row, end = self._json.raw_decode(self._text, self.at)
            except (ValueError, RecursionError) as error:
                if not self._whole and self._may_go_on(error):
                    if len(self._text) - self.at > MAX_ROW:
                        raise LimbeckError(too_long(place(str(self._path), line, index))) from error
                    self._more()
                    continue
                failed, what = line, str(error)
                if isinstance(error, json.JSONDecodeError):
                    failed, what = line + self._text.count("\n", self.at, error.pos), error.msg
                raise LimbeckError(
                    f"{self._path}:{failed} is not valid JSON ({what}, in row {index} of the list, which begins on line "
                    f"{line}); correct that row."
                ) from error
            if end < len(self._text) or self._whole:
                self.at = end
                return row
            self._more()

    def _may_go_on(self, error: Exception) -> bool:
        """Returns whether the rest of the row may simply not have been read yet."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos + 16 >= len(self._text)

    def _more(self) -> None:
        """Reads at least as much as the current row has, so that a long row is decoded only a few times."""
        _ = self.line
        self._text, self.at, self._counted = self._text[self.at :], 0, 0
        raw = self._file.read(max(_BLOCK, len(self._text)))
        self._whole = not raw
        try:
            self._text += self._decoder.decode(raw, final=self._whole)
        except UnicodeDecodeError as error:
            # The decoder's input may begin with bytes of the previous block; none of them is a newline.
            line = self._lines_read + error.object.count(b"\n", 0, error.start)
            raise LimbeckError(not_utf8(f"{self._path}:{line}", error.object[error.start], str(self._path))) from error
        self._lines_read += raw.count(b"\n")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, decompressed according to its last suffix. Errors name the file."""
    damaged: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        if path.suffix == ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise LimbeckError(
                    f"{path} needs zstandard to be decompressed; pip install 'limbeck[data]'."
                ) from error
            damaged = (*damaged, zstandard.ZstdError)
            with path.open("rb") as packed:
                yield cast(BinaryIO, io.BufferedReader(_Unpacked(packed, zstandard.ZstdDecompressor()), _BLOCK))
        elif path.suffix == ".gz":
            with gzip.open(path, "rb") as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            with path.open("rb") as file:
                yield file
    except damaged as error:
        raise LimbeckError(f"{path} cannot be read to its end ({error}); it may be damaged or cut off.") from error


class _Unpacked(io.RawIOBase):
    """The content of a zstandard file with any number of frames.

    The library's own reader does not detect a truncated file.
    """

    def __init__(self, packed: BinaryIO, decompressor: Any) -> None:
        self._packed = packed
        self._decompressor = decompressor
        self._frame: Any = None
        self._input = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._input = self._input or self._packed.read(1 << 16)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(frame.decompress(self._input))
            self._input, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
