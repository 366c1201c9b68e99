"""Tokenised rows, in memory or in files that are mapped into it, and the report of what became of them.

Text, templates and batches are not known here.
"""

from __future__ import annotations

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
    """Tokenised rows, one after another. The arrays may be mapped from files larger than memory.

    tokens:  [total] int32.
    labels:  [total] int32; already shifted: the token that each position must predict, or ``IGNORE``.
    offsets: [rows + 1] int64; row i is ``tokens[offsets[i] : offsets[i + 1]]``. No row is empty.
    weights: [total] float32, what multiplies the loss of each position, 0 where nothing is learned; None when all count alike.
    supervised: [rows] supervised positions per row, if they have been counted already.
    groups:  [rows] int32, which entry of ``DataReport.groups`` each row belongs to; None when there is one only.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    supervised: NDArray[np.int32] | None = None
    groups: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The tokens and labels of one row, as views."""
        here = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[here], self.labels[here]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] tokens per row."""
        return np.diff(self.offsets)

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """[rows] supervised positions per row."""
        if self.supervised is not None:
            return self.supervised.astype(np.int64)
        return np.add.reduceat(self.labels != IGNORE, self.offsets[:-1], dtype=np.int64)


@dataclass(frozen=True)
class FileReport:
    """What was found in one file or dataset; ``rows`` are those that were read, the ``bad`` ones among them."""

    path: str
    format: str
    rows: int
    bad: int = 0


@dataclass(frozen=True)
class DataReport:
    """What became of the rows: ``rows`` were read; ``dropped`` says how many are left out, by reason.

    rewritten: rows that the template makes several texts of, as it writes an answer otherwise later; texts: how many.
    truncated: rows cut to ``sequence_length``; cut_answers: those among them that were cut inside a supervised turn, whose
    end token is then not learned. split: rows cut into several. bad: skipped rows, by reason; bad_rows_file: where each of
    them is named. groups: the (number of the source, domain) of the rows. note: what may surprise about the template.
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
            texts = f" ({self.rewritten:,} rows are written as {self.texts:,} texts, which show each answer as it was asked)"
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
    """A ``.npy`` file of one dimension that grows block by block, so that the array never has to be in memory."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._file: BinaryIO = path.open("wb+")
        self._write_header()
        self._start = self._file.tell()

    def append(self, values: NDArray[Any]) -> None:
        """Add ``values`` [n] of the file's type."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def blocks(self) -> list[tuple[int, int]]:
        """The places ``[start, stop)`` of what has been written, in portions to be read back with ``read``."""
        return [(start, min(start + _BLOCK, self._length)) for start in range(0, self._length, _BLOCK)]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """A copy of what was written at ``[start, stop)``."""
        self._file.seek(self._start + start * self._dtype.itemsize)
        values = np.frombuffer(self._file.read((stop - start) * self._dtype.itemsize), self._dtype)
        self._file.seek(0, 2)
        return values

    def close(self) -> None:
        """Write the final length into the header, for whose digits NumPy leaves room."""
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()

    def _write_header(self) -> None:
        described = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, described)
