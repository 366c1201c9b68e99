"""Reads Megatron's pretokenised corpora: a ``.bin`` file of tokens and an ``.idx`` file of their positions.

The format is ``MMapIndexedDataset``: a magic word, a version (1), the number type, the number of sequences and of document
boundaries; then the length (int32) and byte offset (int64) of every sequence, and the first sequence (int64) of every
document. It does not record the tokenizer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.data.sources.items import Document, Item
from limbeck.errors import LimbeckError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus, memory-mapped.

    index, file: the ``.idx`` and the ``.bin`` file. dtype: of a token. data: [bytes] uint8, the content of ``file``.
    sizes: [sequences] int32, tokens of each sequence. offsets: [sequences] int64, the byte at which each begins.
    documents: [documents + 1] int64, the first sequence of each document.
    """

    index: Path
    file: Path
    dtype: np.dtype[Any]
    data: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    offsets: NDArray[np.int64]
    documents: NDArray[np.int64]

    def __len__(self) -> int:
        return max(len(self.documents) - 1, 0)

    def document(self, number: int) -> NDArray[np.integer[Any]]:
        """The tokens [n] of a document."""
        parts = [
            np.frombuffer(self.data, self.dtype, int(self.sizes[i]), int(self.offsets[i]))
            for i in range(int(self.documents[number]), int(self.documents[number + 1]))
        ]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def concatenated(self, first: int, last: int) -> NDArray[np.integer[Any]]:
        """The tokens [n] of the documents in ``[first, last)``, as a view of the file.

        Raises LimbeckError if the file has them in another order.
        """
        if first >= last:
            return np.zeros(0, self.dtype)
        here = slice(int(self.documents[first]), int(self.documents[last]))
        sizes, offsets = self.sizes[here].astype(np.int64), self.offsets[here]
        if (np.diff(offsets) != sizes[:-1] * self.dtype.itemsize).any():
            raise LimbeckError(
                f"{self.index} has sequences that do not follow one another in {self.file}, so they cannot be read as one "
                "text; write the corpus again with Megatron's tools/preprocess_data.py."
            )
        return np.frombuffer(self.data, self.dtype, int(sizes.sum()), int(offsets[0]) if len(offsets) else 0)


def open_corpus(index: Path, tokens: Path) -> Corpus:
    """Maps a corpus into memory. Raises LimbeckError if the files have another format or do not match."""
    try:
        with index.open("rb") as file:
            magic, header = file.read(len(_MAGIC)), file.read(_HEADER.size)
        if magic != _MAGIC or len(header) < _HEADER.size:
            raise LimbeckError(f"{index} is not a Megatron index; name the .bin/.idx pair of a corpus.")
        version, code, sequences, boundaries = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise LimbeckError(
                f"{index} has version {version} and number type {code}; only version 1 with integers is supported."
            )
        start = len(_MAGIC) + _HEADER.size
        left = index.stat().st_size - (start + sequences * 12 + boundaries * 8)
        if left < 0:
            raise LimbeckError(f"{index} is cut off: it names {sequences} sequences; copy it again.")
        if left:
            raise LimbeckError(
                f"{index} has {left} bytes after what its {sequences} sequences need, as corpora of images do, which are not "
                "supported; copy it again, or write the corpus again with Megatron's tools/preprocess_data.py."
            )
        raw = np.memmap(index, dtype=np.uint8, mode="r")
        sizes = np.frombuffer(raw, np.int32, sequences, start)
        offsets = np.frombuffer(raw, np.int64, sequences, start + sequences * 4)
        documents = np.frombuffer(raw, np.int64, boundaries, start + sequences * 12)
        dtype = np.dtype(_DTYPES[code])
        data = np.memmap(tokens, dtype=np.uint8, mode="r") if tokens.stat().st_size else np.zeros(0, np.uint8)
    except (OSError, ValueError) as error:
        raise LimbeckError(f"{index} and {tokens} cannot be read ({error}); both must be there.") from error
    end = int((offsets + sizes.astype(np.int64) * dtype.itemsize).max()) if sequences else 0
    if sequences and (sizes.min() < 0 or offsets.min() < 0 or end > len(data)):
        raise LimbeckError(f"{tokens} is shorter than {index} requires; the two files do not belong together.")
    if end < len(data):
        raise LimbeckError(f"{tokens} is longer than {index} describes; the two files do not belong together.")
    if boundaries and (documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any()):
        raise LimbeckError(f"{index} contains invalid document boundaries; create the index again.")
    return Corpus(index, tokens, dtype, data, sizes, offsets, documents)


def read_megatron(index: Path, tokens: Path) -> Iterator[Item]:
    """Yields the documents of a corpus. Raises LimbeckError if the files have another format or do not match."""
    corpus = open_corpus(index, tokens)
    for number in range(len(corpus)):
        yield Document(corpus.document(number), str(tokens), number)
