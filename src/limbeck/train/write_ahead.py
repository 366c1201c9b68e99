"""Steps whose samples are written before earlier steps are trained, with weights that are some steps old.

With the distance n, step s is written with the weights after step s - n, or the first weights of the run. Without a
distance, ``block`` steps are written together, with the weights before the first of them. That depends on the number of the
step only, not on how fast anything is, so a run can be repeated and resumed exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from limbeck.train.samples import Sample


@dataclass(eq=False)
class WrittenStep:
    """A step whose samples are being written, or are.

    version: of the weights that write. position: of the prompts before the step's own. finish: waits for the samples.
    """

    step: int
    version: int
    position: Mapping[str, Any]
    finish: Callable[[], list[Sample]] = field(repr=False)

    @cached_property
    def samples(self) -> list[Sample]:
        """Waits for them. Collective at the first time."""
        return self.finish()


class WriteAhead:
    """The queue of written steps.

    Args:
        begin: takes the next prompts and begins to write a step; returns the function that waits for its samples.
        position: of the next prompts.
        distance: number of steps between the weights that write and those that are trained.
        end: number of steps of the run, beyond which nothing is written; None if that is not known.
        block: number of steps that are written together; 1 with a distance.
    """

    def __init__(
        self,
        begin: Callable[[int], Callable[[], list[Sample]]],
        position: Callable[[], Mapping[str, Any]],
        distance: int,
        end: int | None = None,
        block: int = 1,
    ) -> None:
        self._begin, self._position, self._distance, self._end = begin, position, distance, end
        self._block = block
        self._queue: deque[WrittenStep] = deque()
        self._next: int | None = None  # the step that is begun next

    def finish(self) -> None:
        """Wait until nothing is being written. Collective."""
        for one in self._queue:
            one.samples  # noqa: B018

    def fill(self, version: int) -> None:
        """Begin every step that the weights after step ``version`` may write before they change."""
        first = version if self._next is None else self._next
        last = version + self._distance
        for step in range(first, 1 + (last if self._end is None else min(last, self._end - 1))):
            self._append(step, version)

    def take(self, step: int, version: int) -> WrittenStep:
        """Step number ``step``, finished. Without a distance it is begun now, as are the others of its block. Collective."""
        if not self._queue:
            last = step + self._block
            for number in range(step, last if self._end is None else max(step + 1, min(last, self._end))):
                self._append(number, version)
            self.finish()  # before the weights change
        taken = self._queue.popleft()
        taken.samples  # noqa: B018
        return taken

    def state_dict(self) -> Mapping[str, Any]:
        """From which the next step and those after it can be made again. The samples are converted when they are read,
        and must have been written by then.

        What the newest weights are writing is left out: a run that resumes has them, and writes it again.
        """
        if not self._queue:
            return self._position()
        kept = [one for one in self._queue if one.version < self._queue[0].step]
        rest = list(self._queue)[len(kept) :]
        return _State(rest[0].position if rest else self._position(), kept)

    def load_state_dict(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Continue where ``state_dict`` was called; returns the position of the prompts."""
        if _QUEUE not in state:
            return state
        for one in state[_QUEUE]:
            samples = [Sample.from_state(values["origin"], values) for values in one["samples"]]
            self._queue.append(WrittenStep(one["step"], one["version"], one["position"], partial(list, samples)))
        self._next = self._queue[-1].step + 1 if self._queue else None
        return state[_POSITION]

    def _append(self, step: int, version: int) -> None:
        position = self._position()
        self._queue.append(WrittenStep(step, version, position, self._begin(step)))
        self._next = step + 1


_POSITION, _QUEUE = "prompts", "written"


class _State(Mapping[str, Any]):
    """A state whose samples become JSON values when they are read: it is taken in every step, and saved in few."""

    def __init__(self, position: Mapping[str, Any], steps: Sequence[WrittenStep]) -> None:
        self._values: dict[str, Callable[[], Any]] = {
            _POSITION: lambda: position,
            _QUEUE: lambda: [
                {
                    "step": one.step,
                    "version": one.version,
                    "position": one.position,
                    "samples": [{"origin": sample.origin, **sample.state()} for sample in one.samples],
                }
                for one in steps
            ],
        }

    def __getitem__(self, key: str) -> Any:
        return self._values[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
