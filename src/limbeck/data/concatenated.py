"""Rows of a fixed length, cut from concatenated documents and read from their files when they are needed.

Row i of a text x of a source has the tokens ``x[i·L : (i + 1)·L]`` and the labels ``x[i·L + 1 : (i + 1)·L + 1]`` with L =
``sequence_length``, as in Megatron's GPTDataset: a row may begin inside a document and contain several, which attend to each
other. What is left at the end of a text is not used. Nothing is copied or cached, so a corpus may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limbeck.data import cache
from limbeck.data.examples import DataReport, Examples, FileReport
from limbeck.data.sources import Source, corpora_of
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK = 1 << 24  # tokens that are searched at a time for the largest id


class Parts:
    """Arrays [n] that follow one another, as one array that is sliced but never copied. A slice lies within one part."""

    def __init__(self, parts: Sequence[NDArray[np.integer[Any]]]) -> None:
        self.parts = tuple(parts)
        self._starts = np.array([0, *accumulate(map(len, parts))])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, here: slice) -> NDArray[np.integer[Any]]:
        number = int(np.searchsorted(self._starts, here.start, side="right")) - 1
        start = int(self._starts[number])
        return self.parts[number][here.start - start : here.stop - start]


def is_concatenated(sources: Sequence[Source]) -> bool:
    """Whether the rows are cut from concatenated documents; a configuration has either only such sources or none."""
    return any(source.concatenate or source.mock is not None for source in sources)


def concatenate(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, length: int, cache_dir: Path | None
) -> tuple[Examples, DataReport]:
    """Returns the rows of ``length`` tokens of all sources. Every token is supervised.

    cache_dir: folder in which the largest token id of a large corpus is kept.

    Raises LimbeckError for a corpus that cannot be read, holds a negative token id, or is too short for one row.
    """
    texts: list[NDArray[np.integer[Any]]] = []
    files: list[FileReport] = []
    counts = [0] * len(sources)
    largest = 0
    for number, source in enumerate(sources):
        for name, text, highest in _texts(source, tokenizer, length, cache_dir):
            rows = max(len(text) - 1, 0) // length
            files.append(FileReport(name, "concatenated tokens", rows))
            counts[number] += rows
            largest = max(largest, highest)
            if rows:
                texts.append(text[: rows * length + 1])
        if not counts[number]:
            raise LimbeckError(
                f"{source.name} has fewer tokens than one row needs, sequence_length + 1 = {length + 1}; lower "
                "sequence_length, take a larger part of its documents, or remove it."
            )
    total = sum(counts)
    examples = Examples(
        tokens=Parts([text[:-1] for text in texts]),  # type: ignore[arg-type]
        labels=Parts([text[1:] for text in texts]),  # type: ignore[arg-type]
        offsets=np.arange(total + 1, dtype=np.int64) * length,
        supervised=np.full(total, length, dtype=np.int32),
        groups=np.repeat(np.arange(len(sources), dtype=np.int32), counts) if len(sources) > 1 else None,
    )
    report = DataReport(
        files=tuple(files),
        template="none, the data is tokenised",
        sequence_length=length,
        rows=total,
        truncated=0,
        dropped={},
        tokens=total * length,
        supervised_tokens=total * length,
        groups=tuple((number, source.name) for number, source in enumerate(sources)),
        largest_token=largest,
    )
    return examples, report


def _texts(
    source: Source, tokenizer: PreTrainedTokenizerBase, length: int, cache_dir: Path | None
) -> list[tuple[str, NDArray[np.integer[Any]], int]]:
    """The name, the tokens [n] and the largest token id of each text of a source."""
    if source.mock is not None:
        # Without added tokens, which a model may not have.
        text = mock_tokens(source.mock * length + 1, length, tokenizer.vocab_size, int(tokenizer.eos_token_id))
        return [(source.name, text, int(text.max()))]
    found = []
    for corpus in corpora_of(source):
        first, last = (round(fraction * len(corpus)) for fraction in source.documents)
        whole = np.frombuffer(corpus.data, corpus.dtype, len(corpus.data) // corpus.dtype.itemsize)
        if cache_dir is None:
            lowest, highest = _extremes(whole)
        else:
            lowest, highest = cache.remembered(corpus.file, cache_dir, "token_ids", lambda: _extremes(whole))  # noqa: B023
        if lowest < 0:
            raise LimbeckError(f"{corpus.file} holds the token id {lowest}; ids are whole numbers from 0.")
        found.append((str(corpus.file), corpus.concatenated(first, last), highest))
    return found


def _extremes(tokens: NDArray[np.integer[Any]]) -> tuple[int, int]:
    """The smallest and the largest of ``tokens`` [n]; 0 if there are none."""
    blocks = [tokens[start : start + _BLOCK] for start in range(0, len(tokens), _BLOCK)]
    return min((int(block.min()) for block in blocks), default=0), max((int(b.max()) for b in blocks), default=0)


def mock_tokens(count: int, longest: int, vocab_size: int, end: int) -> NDArray[np.int32]:
    """Made-up documents of up to ``longest`` tokens as one text [count]: consecutive ids from a random one, then ``end``.

    It is the same in every run.
    """
    random = np.random.default_rng(0)
    lengths = random.integers(1, max(longest, 2), size=2 + 4 * count // max(longest, 2))
    while lengths.sum() < count:
        lengths = np.concatenate([lengths, lengths])
    starts = random.integers(0, vocab_size, size=len(lengths))
    ends = np.cumsum(lengths)
    tokens = (np.arange(ends[-1]) - np.repeat(ends - lengths, lengths) + np.repeat(starts, lengths)) % vocab_size
    tokens[ends - 1] = end
    return tokens[:count].astype(np.int32)
