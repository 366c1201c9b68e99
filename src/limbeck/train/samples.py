"""The samples of an on-policy step: texts of which the student, the data or somebody else has written the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from limbeck.data.examples import Examples
from limbeck.data.masks import IGNORE

_BLOCK = 1 << 16  # rows

DATASET, STUDENT = "dataset", "student"
"""Origins of an answer."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One text of a step.

    row: of the data. number: of the sample among those of its prompt. origin: who wrote the answer.
    tokens, labels: [length] int32, as in ``Examples``. log_probs: [length] float32, of each label under the distribution that
    it was sampled from, NaN elsewhere; None if nothing was sampled. finished: the answer was not cut off.
    reward: of the answer, from the environment; None without one, or if it is not known. reason: why it is not known, or why
    no answer was found.
    """

    row: int
    number: int
    origin: str
    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    log_probs: NDArray[np.float32] | None = None
    finished: bool = True
    reward: float | None = None
    reason: str = ""

    @classmethod
    def written(
        cls,
        row: int,
        number: int,
        origin: str,
        prompt: Sequence[int],
        answer: Sequence[int],
        log_probs: Sequence[float] | None,
        finished: bool,
    ) -> Sample:
        """A prompt with the answer that a generator wrote, which is supervised from its first to its last token."""
        tokens = np.array([*prompt, *answer], dtype=np.int32)
        labels = np.full(len(tokens), IGNORE, dtype=np.int32)
        labels[len(prompt) - 1 : -1] = answer
        of_labels = None
        if log_probs is not None:
            of_labels = np.full(len(tokens), np.nan, dtype=np.float32)
            of_labels[len(prompt) - 1 : -1] = log_probs
        return cls(row, number, origin, tokens, labels, of_labels, finished)

    @property
    def num_answer_tokens(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels != IGNORE).sum())


def to_examples(samples: Sequence[Sample]) -> Examples:
    """The samples as rows that can be packed or padded into a step."""
    offsets = np.concatenate([[0], np.cumsum([len(sample.tokens) for sample in samples])]).astype(np.int64)
    log_probs = None
    if any(sample.log_probs is not None for sample in samples):
        log_probs = np.concatenate(
            [
                np.full(len(sample.tokens), np.nan, np.float32) if sample.log_probs is None else sample.log_probs
                for sample in samples
            ]
        )
    return Examples(
        np.concatenate([sample.tokens for sample in samples]).astype(np.int32),
        np.concatenate([sample.labels for sample in samples]).astype(np.int32),
        offsets,
        row_ids=np.array([sample.row for sample in samples], dtype=np.int64),
        sampled_log_probs=log_probs,
    )


def answer_starts(examples: Examples) -> NDArray[np.int64]:
    """[rows] number of tokens before the last answer of each row, which is what the student would write."""
    starts = np.empty(len(examples), dtype=np.int64)
    for low in range(0, len(examples), _BLOCK):  # the arrays may be mapped from files larger than memory
        offsets = examples.offsets[low : low + _BLOCK + 1]
        begin = offsets[0]
        supervised = np.asarray(examples.labels[begin : offsets[-1]]) != IGNORE
        before = np.concatenate([[False], supervised[:-1]])
        before[offsets[:-1] - begin] = False
        position = np.arange(len(supervised)) - np.repeat(offsets[:-1] - begin, np.diff(offsets))
        first = np.where(supervised & ~before, position, -1)
        starts[low : low + _BLOCK] = np.maximum.reduceat(first, offsets[:-1] - begin) + 1
    return starts
