"""When steps are made and requested, and which position in the data belongs to the step that is taken next."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from limbeck.train.request_pipeline import RequestPipeline, prefetch_requests


class CountingSource:
    """Steps of two micro-batches, ``("a", step)`` and ``("b", step)``; its state is the number of the next step."""

    def __init__(self, events: list, max_lookahead: int) -> None:
        self.events, self.max_lookahead, self.made = events, max_lookahead, 0

    def next(self, step: int) -> SimpleNamespace:
        self.events.append(f"next {step}")
        self.made = step + 1
        return SimpleNamespace(micro_batches=(("a", step), ("b", step)))

    def state_dict(self) -> dict:
        return {"next": self.made}


class Rig:
    """A pipeline over a ``CountingSource`` that notes every event."""

    def __init__(self, max_lookahead: int, *, turns: bool = False, offload_interval: int = 1) -> None:
        self.events: list[str] = []
        self.source = CountingSource(self.events, max_lookahead)
        turn = self._turn if turns else None
        self.pipeline = RequestPipeline(self.source, self._prepare, self._request, turn, offload_interval)

    def _prepare(self, batch: SimpleNamespace) -> SimpleNamespace:
        prepared = tuple((name.upper(), step) for name, step in batch.micro_batches)
        return SimpleNamespace(micro_batches=prepared)

    def _request(self, micro_batch):
        name, step = micro_batch
        self.events.append(f"request {name}{step}")
        return f"signal {name}{step}"

    @contextmanager
    def _turn(self):
        self.events.append("turn begins")
        yield
        self.events.append("turn ends")

    def take(self, step: int, total: int):
        taken = self.pipeline.take(step, total - step)
        assert taken.batch.micro_batches == (("A", step), ("B", step))
        assert taken.signals == (f"signal A{step}", f"signal B{step}")
        self.events.append(f"take {step}")


def requested(step: int) -> list[str]:
    return [f"next {step}", f"request A{step}", f"request B{step}"]


def in_turn(*steps: int) -> list[str]:
    """The student may write a step, so it is made before the teacher replaces the student on the device."""
    requests = [event for step in steps for event in requested(step)[1:]]
    return [*(f"next {step}" for step in steps), "turn begins", *requests, "turn ends"]


def test_without_lookahead_a_step_is_made_when_it_is_taken():
    rig = Rig(max_lookahead=0)
    for step in range(2):
        rig.take(step, total=3)
    assert rig.events == [*requested(0), "take 0", *requested(1), "take 1"]


@pytest.mark.parametrize("max_lookahead", [1, 2, 5])
def test_with_lookahead_the_next_step_is_requested_before_this_one_is_taken(max_lookahead):
    rig = Rig(max_lookahead)
    for step in range(2):
        rig.take(step, total=9)
    assert rig.events == [*requested(0), *requested(1), "take 0", *requested(2), "take 1"]


@pytest.mark.parametrize(("max_lookahead", "turns"), [(0, False), (1, False), (0, True), (1, True)])
def test_no_step_beyond_the_last_is_made(max_lookahead, turns):
    rig = Rig(max_lookahead, turns=turns, offload_interval=4)
    for step in range(6):
        rig.take(step, total=6)
    assert [event for event in rig.events if event.startswith("next")] == [f"next {step}" for step in range(6)]


def test_a_run_that_resumes_makes_steps_from_its_own_number_on():
    rig = Rig(max_lookahead=1)
    rig.take(7, total=9)
    assert rig.events == [*requested(7), *requested(8), "take 7"]


@pytest.mark.parametrize(("max_lookahead", "turns"), [(0, False), (1, False), (0, True), (1, True)])
def test_the_state_is_that_of_the_step_taken_next(max_lookahead, turns):
    rig = Rig(max_lookahead, turns=turns, offload_interval=3)
    for step in range(5):
        assert rig.pipeline.state_dict() == {"next": step}
        rig.take(step, total=5)
    assert rig.pipeline.state_dict() == {"next": 5}


def test_a_colocated_teacher_gets_the_requests_of_an_interval_in_one_turn():
    rig = Rig(max_lookahead=1, turns=True, offload_interval=3)
    for step in range(5):
        rig.take(step, total=5)
    assert rig.events == [
        *in_turn(0, 1, 2), "take 0", "take 1", "take 2", *in_turn(3, 4), "take 3", "take 4",
    ]  # fmt: skip


def test_a_colocated_teacher_gets_one_step_a_turn_if_steps_depend_on_the_weights():
    rig = Rig(max_lookahead=0, turns=True, offload_interval=3)
    for step in range(2):
        rig.take(step, total=5)
    assert rig.events == [*in_turn(0), "take 0", *in_turn(1), "take 1"]


def test_prefetched_requests_run_one_batch_ahead():
    events = []

    def batches():
        for name in "abc":
            events.append(f"make {name}")
            yield name

    def request(name):
        events.append(f"request {name}")
        return name.upper()

    for name, future in prefetch_requests(batches(), request):
        assert future == name.upper()
        events.append(f"use {name}")
    assert events == [
        "make a", "request a", "make b", "request b", "use a", "make c", "request c", "use b", "use c",
    ]  # fmt: skip
    assert list(prefetch_requests([], request)) == []
