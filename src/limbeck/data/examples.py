"""Tokenised rows, in memory or memory-mapped, and the report about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from limbeck.data.masks import IGNORE

_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised rows, concatenated. The arrays may be memory-mapped from files larger than memory.

    tokens:  [total] int32, or ``limbeck.data.concatenated.Parts`` of integers.
    labels:  [total] int32; shifted by one: the token that each position must predict, or ``IGNORE``.
    offsets: [rows + 1] int64; row i is ``tokens[offsets[i] : offsets[i + 1]]``. No row is empty.
    weights: [total] float32, factor of each position's loss, 0 at unsupervised positions; None when all are 1.
    supervised: [rows] number of supervised positions per row, if already counted.
    groups:  [rows] int32, index into ``DataReport.groups``; None with only one group.
    columns: [bytes] uint8, the columns of each row as UTF-8 JSON; None if they were not kept. column_ends: [rows] int64, where
    each row's columns end.
    teacher_prompts: [tokens] int32, the prompts that the teacher reads instead of the student's; None if they read the same.
    teacher_prompt_ends: [rows] int64, where each row's prompt of the teacher ends.
    row_ids: [rows] int64, the number of the dataset row that each was made from; None if it is the row's own number.
    objectives: [rows] int8, index of the objective of each row; None when all have the same.
    sampled_log_probs: [total] float32, log-probability of each label under the distribution that it was sampled from; NaN
    where it was not sampled. None when no label was.
    advantages: [total] float32, the advantage of each label in a policy gradient; None without one.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    supervised: NDArray[np.int32] | None = None
    groups: NDArray[np.int32] | None = None
    columns: NDArray[np.uint8] | None = None
    column_ends: NDArray[np.int64] | None = None
    row_ids: NDArray[np.int64] | None = None
    objectives: NDArray[np.int8] | None = None
    sampled_log_probs: NDArray[np.float32] | None = None
    advantages: NDArray[np.float32] | None = None
    teacher_prompts: NDArray[np.int32] | None = None
    teacher_prompt_ends: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns views of the tokens and labels of one row."""
        here = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[here], self.labels[here]

    def columns_of(self, index: int) -> dict[str, Any]:
        """Returns the columns of the dataset row from which row ``index`` was made. They must have been kept."""
        assert self.columns is not None and self.column_ends is not None
        start = self.column_ends[index - 1] if index else 0
        found: dict[str, Any] = json.loads(self.columns[start : self.column_ends[index]].tobytes())
        return found

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] number of tokens per row."""
        return np.diff(self.offsets)

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """[rows] number of supervised positions per row."""
        if self.supervised is not None:
            return self.supervised.astype(np.int64)
        return np.add.reduceat(self.labels != IGNORE, self.offsets[:-1], dtype=np.int64)


@dataclass(frozen=True)
class FileReport:
    """Counts of one file or dataset: ``rows`` read, including ``bad`` ones."""

    path: str
    format: str
    rows: int
    bad: int = 0


@dataclass(frozen=True)
class DataReport:
    """Counts of what happened to the rows.

    rows:          rows read.
    dropped:       number of rows left out, by reason.
    rewritten:     rows that the template renders as several texts, because it changes earlier answers.
    texts:         number of texts of the rewritten rows.
    truncated:     rows cut to ``sequence_length``.
    cut_answers:   truncated rows that were cut inside a supervised turn, whose end token is then not learned.
    split:         rows split into several.
    bad:           number of skipped rows, by reason.
    bad_rows_file: file that lists every skipped row.
    groups:        (source number, domain) of each group of rows.
    note:          a warning about the template, or empty.
    """

    files: tuple[FileReport, ...]
    template: str
    sequence_length: int
    rows: int
    truncated: int
    dropped: Mapping[str, int]
    tokens: int
    supervised_tokens: int
    cut_answers: int = 0
    split: int = 0
    rewritten: int = 0
    texts: int = 0
    bad: Mapping[str, int] = field(default_factory=dict)
    bad_rows_file: str | None = None
    groups: tuple[tuple[int, str], ...] = ()
    largest_token: int = 0
    note: str = ""

    def __str__(self) -> str:
        files = ", ".join(f"{file.path} ({file.rows:,} rows of {file.format})" for file in self.files[:3])
        if len(self.files) > 3:
            files += f" and {len(self.files) - 3} more files"
        dropped = "; ".join(f"{count:,} dropped: {reason}" for reason, count in self.dropped.items()) or "none dropped"
        texts = ""
        if self.rewritten:
            texts = (
                f" ({self.rewritten:,} rows are written as {self.texts:,} texts, which show each answer as generated)"
            )
        cut = f"{self.truncated:,} rows truncated to {self.sequence_length} tokens"
        if self.cut_answers:
            cut += f" ({self.cut_answers:,} of them inside an answer, so its end is not learned)"
        if self.split:
            cut += f"; {self.split:,} rows split into pieces of {self.sequence_length} tokens"
        bad = ""
        if self.bad:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.bad.items())
            listed = f", listed in {self.bad_rows_file}" if self.bad_rows_file else ""
            total = sum(self.bad.values())
            bad = f"; {total:,} bad row{'s' * (total != 1)} skipped ({reasons}){listed}"
        return (
            f"{self.rows:,} rows from {files}; template: {self.template}{texts}; "
            f"{self.tokens:,} tokens, of which {self.supervised_tokens:,} supervised; "
            f"{cut}; {dropped}{bad}." + (f"\nnote: {self.note}" if self.note else "")
        )


class ArrayFile:
    """A one-dimensional ``.npy`` file written block by block, so that the array need not fit in memory."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._file: BinaryIO = path.open("wb+")
        self._write_header()
        self._start = self._file.tell()

    def append(self, values: NDArray[Any]) -> None:
        """Appends ``values`` [n]."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def blocks(self) -> list[tuple[int, int]]:
        """Returns ``[start, stop)`` ranges of what was written, for ``read``."""
        return [(start, min(start + _BLOCK, self._length)) for start in range(0, self._length, _BLOCK)]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Returns a copy of the values in ``[start, stop)``."""
        self._file.seek(self._start + start * self._dtype.itemsize)
        values = np.frombuffer(self._file.read((stop - start) * self._dtype.itemsize), self._dtype)
        self._file.seek(0, 2)
        return values

    def close(self) -> None:
        """Writes the final length into the header, where NumPy reserves space for it, and closes the file."""
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()

    def _write_header(self) -> None:
        described = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, described)
