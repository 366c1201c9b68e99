"""From characters to tokens: which tokens are learned, how much each counts, and the one shift.

Everything that says "this position is supervised" is decided here; texts and tokenizers are not known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""The label of a position that is not learned."""


def supervise(
    places: NDArray[np.int64], spans: Sequence[tuple[int, int, float]], everything: bool = False, weight: float = 1.0
) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
    """Which tokens [n], standing at the characters ``places`` [n, 2], are learned, and the weight of each one's loss [n].

    A token that touches a span is learned with the span's weight; the others not at all or, with ``everything``, with
    ``weight``. Weight 0 is not learned. The weights are None when every learned token counts 1.
    Some tokenizers leave a token's blanks out of its place, so a gap before a token is counted as the token's own.
    """
    reached = np.maximum.accumulate(np.concatenate(([0], places[:-1, 1])))
    start = np.minimum(places[:, 0], reached)
    weights = np.full(len(places), weight if everything else 0.0, dtype=np.float32)
    for first, last, of_span in spans:
        weights[(start < last) & (places[:, 1] > first)] = of_span
    supervised = weights > 0
    return supervised, None if (weights[supervised] == 1).all() else weights


def shift(
    tokens: NDArray[np.int32], supervised: NDArray[np.bool_], weights: NDArray[np.float32] | None
) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    """Labels [n] and their weights [n]: position t is to predict token t + 1 if that token is supervised.

    Masks that are longer than ``tokens``, because those were cut, lose their ends.
    """
    length = len(tokens)
    labels = np.full_like(tokens, IGNORE)
    labels[:-1] = np.where(supervised[1:length], tokens[1:], IGNORE)
    if weights is None:
        return labels, None
    shifted = np.zeros(length, dtype=np.float32)
    shifted[:-1] = np.where(supervised[1:length], weights[1:length], 0)
    return labels, shifted
