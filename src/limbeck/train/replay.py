"""The newest samples that the student has written, from which earlier ones are trained on again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from limbeck.train.samples import REPLAY, Sample


class ReplayBuffer:
    """The ``capacity`` newest samples that were added."""

    def __init__(self, capacity: int) -> None:
        # The state of a sample never changes, so it is made once and not with every checkpoint.
        self._entries: deque[tuple[Sample, dict[str, Any]]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_full(self) -> bool:
        """Whether it holds as many samples as it can."""
        return len(self._entries) == self._entries.maxlen

    def add(self, samples: Iterable[Sample]) -> None:
        """Add samples, the oldest first.

        They lose the log-probabilities of the weights that wrote them and their rewards, which are about another step.
        """
        for sample in samples:
            kept = replace(sample, origin=REPLAY, log_probs=None, reward=None)
            self._entries.append((kept, kept.state()))

    def pick(self, draw: float) -> Sample:
        """The sample at the position ``draw``, in [0, 1), of the buffer."""
        return self._entries[int(draw * len(self._entries))][0]

    def state(self) -> list[dict[str, Any]]:
        """The samples as JSON values, the oldest first."""
        return [state for _, state in self._entries]

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Replace the samples by those of ``state``."""
        self._entries.clear()
        self.add(Sample.from_state(REPLAY, state) for state in states)
