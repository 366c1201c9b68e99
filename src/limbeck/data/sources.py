"""Reading records from JSON and JSONL files, each with the place it came from.

A source yields rows as they stand in the file. What their keys mean is decided in ``rows``.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.errors import LimbeckError

_SUFFIXES = (".json", ".jsonl")


class Record(NamedTuple):
    """One row and where it was read, so that whatever is wrong with it can be named."""

    row: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """``file:line``, the form that editors and terminals turn into a link."""
        return f"{self.file}:{self.line}"


def expand(files: Sequence[str | Path]) -> list[Path]:
    """The existing files that the given names and globs (``*``, ``?``, ``[…]``, ``**``) stand for, in a stable order.

    Raises LimbeckError when a name matches nothing, is a folder, or is neither ``.json`` nor ``.jsonl``.
    """
    paths: list[Path] = []
    for name in files:
        path = Path(name).expanduser()
        if path.exists() or not glob.has_magic(str(name)):
            paths.append(_checked(path))
            continue
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
        if not matches:
            raise LimbeckError(f"No file matches {name}; check the pattern, which is relative to {Path.cwd()}.")
        paths.extend(_checked(match) for match in matches)
    if not paths:
        raise LimbeckError("No data files are given; name at least one in data_args.file_name.")
    return paths


def read_records(path: Path) -> Iterator[Record]:
    """The rows of one file: a JSON list of objects, or one object per line.

    A ``.json`` file whose first character is not ``[`` is read line by line, because many JSONL files carry that name.
    Raises LimbeckError, naming the file and the line, on anything that is not UTF-8, not JSON or not an object.
    """
    if path.suffix == ".json" and _starts_with_bracket(path):
        yield from _read_list(path)
    else:
        yield from _read_lines(path)


def _checked(path: Path) -> Path:
    if path.is_dir():
        raise LimbeckError(f"{path} is a folder; name its files, for example {path}/*.jsonl.")
    if not path.exists():
        folder = path.parent
        names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(str(folder / name) for name in near)}?" if near else "check the path."
        missing = "does not exist" if folder.is_dir() else f"does not exist, nor does the folder {folder}"
        raise LimbeckError(f"The data file {path} {missing} (looked from {Path.cwd()}); {hint}")
    if not os.access(path, os.R_OK):
        raise LimbeckError(f"{path} may not be read by this user; change its permissions.")
    if path.suffix not in _SUFFIXES:
        raise LimbeckError(f"{path} is not a {' or '.join(_SUFFIXES)} file; convert it to one JSON object per line.")
    return path


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            text = line.removeprefix(b"\xef\xbb\xbf").lstrip()
            if text:
                return text.startswith(b"[")
    return False


def _read_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, path, number)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise LimbeckError(
                    f"{where} is not valid JSON ({what}); write one complete JSON object on each line, "
                    "or put all objects into one JSON list in a .json file."
                ) from error
            yield Record(_object(row, where), str(path), number)


def _read_list(path: Path) -> Iterator[Record]:
    """Decode item by item, so that every row knows its line and a mistake is found in its row."""
    raw = path.read_bytes()
    text = _decode(raw.removeprefix(b"\xef\xbb\xbf"), path, 1)
    decoder = json.JSONDecoder()
    position, line, index = _skip_blank(text, text.index("[") + 1), 1, 0
    counted = 0  # newlines before this character are in `line`
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            failed, what = (error.lineno, error.msg) if isinstance(error, json.JSONDecodeError) else (line, str(error))
            raise LimbeckError(
                f"{path}:{failed} is not valid JSON ({what}, in row {index} of the list, which begins on line {line}); "
                "correct that row."
            ) from error
        yield Record(_object(row, f"{path}:{line} (row {index} of the list)"), str(path), line)
        index += 1
        position = _skip_blank(text, position)
        if text.startswith(",", position):
            position = _skip_blank(text, position + 1)
        elif not text.startswith("]", position):
            line += text.count("\n", counted, position)
            raise LimbeckError(
                f"{path}:{line} is not valid JSON (expected ',' or ']' after row {index - 1} of the list); "
                "the file may have been cut off."
            )
    rest = _skip_blank(text, position + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        raise LimbeckError(f"{path}:{line} has text after the end of the list; keep one list of objects in the file.")


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise LimbeckError(
            f"{path}:{line} is not UTF-8 (byte 0x{raw[error.start]:02x}); convert the file, "
            f"for example: iconv -f <its encoding> -t utf-8 {path}"
        ) from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise LimbeckError(
            f"{where} holds a JSON {_JSON_NAMES[type(row)]}, not an object; "
            'each row must look like {"question": "…", "answer": "…"}.'
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
