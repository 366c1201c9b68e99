"""The loss mask: which tokens are supervised, the weight of each one's loss, and the shift by one position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""The label of a position that is not supervised."""


def supervise(
    offsets: NDArray[np.int64], spans: Sequence[tuple[int, int, float]], everything: bool = False, weight: float = 1.0
) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
    """Returns which tokens are supervised [n], and the weight of each one's loss [n] or None if all are 1.

    offsets: [n, 2] the characters ``[start, end)`` of each token. spans: ``(start, end, weight)`` of each answer, in
    characters. A token that overlaps a span is supervised with the span's weight. Other tokens are supervised only with
    ``everything``, with the weight ``weight``. A token of weight 0 is not supervised.

    Some tokenizers exclude a token's leading blanks from its offsets, so a gap before a token counts as part of the token.
    """
    reached = np.maximum.accumulate(np.concatenate(([0], offsets[:-1, 1])))
    start = np.minimum(offsets[:, 0], reached)
    weights = np.full(len(offsets), weight if everything else 0.0, dtype=np.float32)
    for first, last, of_span in spans:
        weights[(start < last) & (offsets[:, 1] > first)] = of_span
    supervised = weights > 0
    return supervised, None if (weights[supervised] == 1).all() else weights


def last_answer(supervised: NDArray[np.bool_]) -> int:
    """Returns the number of tokens before the last answer, a run of supervised tokens [n]; all n if there is none."""
    starts = np.flatnonzero(supervised & ~np.concatenate(([False], supervised[:-1])))
    return int(starts[-1]) if len(starts) else len(supervised)


def shift(
    tokens: NDArray[np.int32], supervised: NDArray[np.bool_], weights: NDArray[np.float32] | None
) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    """Returns labels [n] and their weights [n] or None: position t predicts token t + 1 if that token is supervised.

    Masks may be longer than ``tokens``, if those were truncated; the rest is ignored.
    """
    length = len(tokens)
    labels = np.full_like(tokens, IGNORE)
    labels[:-1] = np.where(supervised[1:length], tokens[1:], IGNORE)
    if weights is None:
        return labels, None
    shifted = np.zeros(length, dtype=np.float32)
    shifted[:-1] = np.where(supervised[1:length], weights[1:length], 0)
    return labels, shifted
