"""The samples of an on-policy step: texts of which the student, the data or somebody else has written the answer."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.data.examples import Examples
from limbeck.data.masks import IGNORE

_BLOCK = 1 << 16  # rows

DATASET, STUDENT, TEACHER, REPLAY = "dataset", "student", "teacher", "replay"
"""Origins of an answer. REPLAY: the student has written it in an earlier step."""

_ARRAYS = {"tokens": "<i4", "labels": "<i4", "log_probs": "<f4", "weights": "<f4"}
"""Names of a sample's arrays and their types in its state."""
_VALUES = ("row", "number", "finished", "reward", "reason")


@dataclass(frozen=True, eq=False)
class Sample:
    """One text of a step.

    row: of the data. number: of the sample among those of its prompt. origin: who wrote the answer.
    tokens, labels: [length] int32, as in ``Examples``. log_probs: [length] float32, of each label under the distribution that
    it was sampled from, NaN elsewhere; None if nothing was sampled. finished: the answer was not cut off. weights: [length]
    float32, factor of each label's loss, 0 where there is none; None when all are 1.
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
    weights: NDArray[np.float32] | None = None
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
        weight: float = 1.0,
    ) -> Sample:
        """A prompt with the answer that a generator wrote, which is supervised from its first to its last token.

        weight: factor of the loss of each token of the answer.
        """
        tokens = np.array([*prompt, *answer], dtype=np.int32)
        labels = np.full(len(tokens), IGNORE, dtype=np.int32)
        labels[len(prompt) - 1 : -1] = answer
        of_labels = None
        if log_probs is not None:
            of_labels = np.full(len(tokens), np.nan, dtype=np.float32)
            of_labels[len(prompt) - 1 : -1] = log_probs
        weights = None if weight == 1 else np.where(labels == IGNORE, 0, weight).astype(np.float32)
        return cls(row, number, origin, tokens, labels, of_labels, finished, weights)

    @classmethod
    def from_state(cls, origin: str, state: Mapping[str, Any]) -> Sample:
        """The inverse of ``state``."""
        arrays: dict[str, Any] = {
            name: None if state[name] is None else np.frombuffer(b64decode(state[name]), dtype)
            for name, dtype in _ARRAYS.items()
        }
        return cls(origin=origin, **{name: state[name] for name in _VALUES}, **arrays)

    def state(self) -> dict[str, Any]:
        """JSON values from which exactly this sample can be made again; the origin is left out."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        return {
            **{name: getattr(self, name) for name in _VALUES},
            **{
                name: None if array is None else b64encode(array.astype(_ARRAYS[name]).tobytes()).decode()
                for name, array in arrays.items()
            },
        }

    @property
    def num_answer_tokens(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels != IGNORE).sum())


def to_examples(
    samples: Sequence[Sample],
    objectives: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    reward_weight: float = 0.0,
) -> Examples:
    """The samples as rows that can be packed or padded into a step.

    objectives: index of the objective of each origin, if they have several. weights: factor of the loss of each origin, 1 if
    not given. reward_weight: factor of the advantages that rewards give; 0 for none.
    """
    factors = [(weights or {}).get(sample.origin, 1.0) for sample in samples]
    of_labels = None
    if any(factor != 1 or sample.weights is not None for sample, factor in zip(samples, factors, strict=True)):
        of_labels = np.concatenate(
            [
                factor * ((sample.labels != IGNORE).astype(np.float32) if sample.weights is None else sample.weights)
                for sample, factor in zip(samples, factors, strict=True)
            ]
        ).astype(np.float32)
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
        weights=of_labels,
        objectives=np.array([objectives[sample.origin] for sample in samples], np.int8) if objectives else None,
        row_ids=np.array([sample.row for sample in samples], dtype=np.int64),
        sampled_log_probs=log_probs,
        advantages=_reward_advantages(samples, reward_weight) if reward_weight else None,
    )


def _reward_advantages(samples: Sequence[Sample], weight: float) -> NDArray[np.float32]:
    """[total] of each token: ``weight`` times its sample's reward, less the mean of the rewards of the same prompt.

    0 for a sample without a reward.
    """
    groups: dict[int, list[float]] = {}
    for sample in samples:
        if sample.reward is not None:
            groups.setdefault(sample.row, []).append(sample.reward)
    means = {row: sum(rewards) / len(rewards) for row, rewards in groups.items()}
    of_sample = [0.0 if one.reward is None else weight * (one.reward - means[one.row]) for one in samples]
    return np.repeat(np.array(of_sample, dtype=np.float32), [len(sample.tokens) for sample in samples])


def answer_starts(examples: Examples) -> NDArray[np.int64]:
    """[rows] number of tokens before the last answer of each row, which is what the student would write. All tokens of a row
    without an answer count.
    """
    starts = np.empty(len(examples), dtype=np.int64)
    for low in range(0, len(examples), _BLOCK):  # the arrays may be mapped from files larger than memory
        offsets = examples.offsets[low : low + _BLOCK + 1]
        begin = offsets[0]
        supervised = np.asarray(examples.labels[begin : offsets[-1]]) != IGNORE
        before = np.concatenate([[False], supervised[:-1]])
        before[offsets[:-1] - begin] = False
        position = np.arange(len(supervised)) - np.repeat(offsets[:-1] - begin, np.diff(offsets))
        first = np.where(supervised & ~before, position, -1)
        last = np.maximum.reduceat(first, offsets[:-1] - begin)
        starts[low : low + _BLOCK] = np.where(last < 0, np.diff(offsets), last + 1)
    return starts
