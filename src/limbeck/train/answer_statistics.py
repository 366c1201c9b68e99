"""How long the answers are that a student writes, how they end, and when a run ends because of it."""

from __future__ import annotations

import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.config.schema.rollout import StopIf
from limbeck.data.masks import IGNORE
from limbeck.errors import StopTraining
from limbeck.train.samples import Sample

_ANSWERS = 500  # after which a stop string that has not occurred is reported
_REPETITIONS, _LOOP_TOKENS = 4, 12  # of the same tokens at the end of an answer, and how many tokens these are at least


@dataclass
class AnswerStatistics:
    """Sums over answers.

    count: number of answers. tokens: in all; shortest, longest: of one answer, NaN without answers. truncated: cut off.
    repeated: ending in a loop. empty: with nothing before their end.
    """

    count: int = 0
    tokens: int = 0
    shortest: float = math.nan
    longest: float = math.nan
    truncated: int = 0
    repeated: int = 0
    empty: int = 0

    def add(self, answers: Sequence[Sample]) -> None:
        """Count ``answers``."""
        if not answers:
            return
        tokens = [answer.labels[answer.labels != IGNORE] for answer in answers]
        lengths = list(map(len, tokens))
        texts = [one[:-1] if answer.finished else one for one, answer in zip(tokens, answers, strict=True)]
        self.shortest = float(np.nanmin([self.shortest, *lengths]))
        self.longest = float(np.nanmax([self.longest, *lengths]))
        self.count += len(answers)
        self.tokens += sum(lengths)
        self.truncated += sum(not answer.finished for answer in answers)
        self.repeated += sum(map(ends_in_loop, texts))
        self.empty += sum(len(text) == 0 for text in texts)

    def metrics(self) -> dict[str, float]:
        """Means over the answers, as metrics; all NaN without answers, which leaves them out of the log line."""
        count = self.count or math.nan
        return {
            "rollout/mean_length": self.tokens / count,
            "rollout/min_length": self.shortest,
            "rollout/max_length": self.longest,
            "rollout/truncated_share": self.truncated / count,
            "rollout/repeated_share": self.repeated / count,
            "rollout/empty_share": self.empty / count,
        }


def ends_in_loop(tokens: NDArray[np.int32]) -> bool:
    """Whether the same tokens come four times in a row at the end, over 12 tokens or more."""
    length = len(tokens)
    if length < _LOOP_TOKENS:
        return False
    most = length // _REPETITIONS
    earlier = tokens[length - 1 - most : length - 1][::-1]  # tokens at the distances 1, 2, … from the last one
    for period in 1 + np.flatnonzero(earlier == tokens[-1]):
        tail = tokens[length - max(_REPETITIONS * period, _LOOP_TOKENS) :]
        if np.array_equal(tail[period:], tail[:-period]):
            return True
    return False


_LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "truncated_share": ("rollout/truncated_share", operator.ge),
    "repeated_share": ("rollout/repeated_share", operator.ge),
    "empty_share": ("rollout/empty_share", operator.ge),
    "mean_length_below": ("rollout/mean_length", operator.lt),
    "mean_length_above": ("rollout/mean_length", operator.gt),
}
"""Keys of ``rollout.stop_if``: the metric of each, and when a value of it passes the limit."""


class StopRule:
    """Ends a run whose answers have passed a limit in several steps in a row.

    Steps are counted anew when a run resumes. Steps without answers of the student are left out.
    """

    def __init__(self, settings: StopIf | None) -> None:
        self._for_steps = 0 if settings is None else settings.for_steps
        limits = {} if settings is None else {name: getattr(settings, name) for name in _LIMITS}
        self._limits: dict[str, float] = {name: limit for name, limit in limits.items() if limit is not None}
        self._streaks: Counter[str] = Counter()  # steps in a row by limit
        self._latest: dict[str, float] = {}

    def add(self, answers: Sequence[Sample]) -> None:
        """Note the student's answers of one step."""
        if not self._limits or not answers:
            return
        statistics = AnswerStatistics()
        statistics.add(answers)
        self._latest = statistics.metrics()
        for name, limit in self._limits.items():
            metric, passes = _LIMITS[name]
            self._streaks[name] = self._streaks[name] + 1 if passes(self._latest[metric], limit) else 0

    def check(self, step: int) -> None:
        """Raise StopTraining before step number ``step`` (from 0) if a limit was passed in as many steps as are allowed."""
        for name, limit in self._limits.items():
            if self._streaks[name] >= self._for_steps:
                metric, _ = _LIMITS[name]
                raise StopTraining(
                    f"The run ended before step {step + 1}: {metric} has passed rollout.stop_if.{name} = {limit:g} in "
                    f"{self._streaks[name]} steps in a row, and was {self._latest[metric]:.3g} in the last one. A checkpoint "
                    "was saved; go on from an earlier one with a lower learning_rate or on_policy_fraction, or change stop_if."
                )


class EmptyAnswers:
    """Warns once about a step of whose written answers none has a token.

    Args:
        warns: whether this process warns.
    """

    def __init__(self, warns: bool) -> None:
        self._warns = warns

    def add(self, answers: Sequence[Sample], step: int) -> None:
        """Look at the answers that were written for step number ``step`` (from 0)."""
        if not self._warns or not answers or any(answer.num_answer_tokens for answer in answers):
            return
        self._warns = False
        warnings.warn(
            f"None of the {len(answers)} answers that were written for step {step + 1} has a token, not even one that ends it, "
            "so nothing is learned from them. Usual causes: rollout.generator returns empty completions, or the prompts take "
            "all positions of the model; correct the generator, or remove long prompts. Further such steps are not reported.",
            stacklevel=2,
        )


class UnseenStopStrings:
    """Warns once about stop strings that none of the first 500 answers contains, or none of all in a shorter run."""

    def __init__(self, stop_strings: Sequence[str], tokenizer: Any) -> None:
        self._unseen, self._tokenizer, self._count = set(stop_strings), tokenizer, 0

    def add(self, answers: Sequence[Sample]) -> None:
        """Look for the stop strings in ``answers``."""
        if not self._unseen:
            return
        for answer in answers:
            text = self._tokenizer.decode(answer.labels[answer.labels != IGNORE].tolist())
            self._unseen -= {stop for stop in self._unseen if stop in text}
        self._count += len(answers)
        if self._count >= _ANSWERS:
            self.report()

    def report(self) -> None:
        """Warn about the stop strings that have not occurred so far, if there was an answer."""
        if self._unseen and self._count:
            warnings.warn(
                f"None of the student's first {self._count} answers contains the stop string "
                f"{' or '.join(sorted(map(repr, self._unseen)))}; compare rollout.stop_strings with the answers of the data.",
                stacklevel=2,
            )
            self._unseen = set()
