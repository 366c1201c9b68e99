"""A step source over the dataset that notes every call."""

from collections.abc import Callable
from typing import Any

import torch

from limbeck.data.batch import StepBatch
from limbeck.train.step_source import DatasetSource, Weights


class RecordingSource(DatasetSource):
    """events: what was called, in order. states: the state before each ``next``, by step. weights: a copy of the student's
    weights after each step. seeds: of PyTorch's generator in each step. fail: raises before the call that it is given.
    """

    def __init__(self, *args: Any, fail: Callable[[str], None] = lambda event: None) -> None:
        super().__init__(*args)
        self.events: list[str] = []
        self.states: dict[int, dict] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.seeds: dict[int, int] = {}
        self.loaded: dict | None = None
        self._fail = fail

    def _note(self, event: str) -> None:
        self.events.append(event)
        self._fail(event)

    def next(self, step: int) -> StepBatch:
        self._note(f"next {step}")
        self.states[step] = self.state_dict()
        return super().next(step)

    def weights_changed(self, weights: Weights, step: int) -> None:
        self._note(f"weights {step}")
        self.weights[step] = {name: tensor.clone() for name, tensor in weights()}
        self.seeds[step] = torch.initial_seed()

    def load_state_dict(self, state: Any) -> None:
        self._note("load")
        self.loaded = dict(state)
        super().load_state_dict(state)

    def metrics(self):
        return {}

    def close(self) -> None:
        self._note("close")
        super().close()
