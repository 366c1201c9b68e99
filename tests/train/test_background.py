"""A job behind the loop fails on all ranks or on none."""

import pytest
from strategies.engines import ALONE

from limbeck import LimbeckError
from limbeck.strategies.world import World
from limbeck.train.background import BackgroundWork


def test_a_job_that_fails_is_an_error_of_the_next_wait_only():
    background = BackgroundWork(ALONE)
    background.wait()
    background.start(lambda: background.together(lambda: 1 / 0))
    with pytest.raises(LimbeckError, match="ZeroDivisionError: division by zero"):
        background.wait()
    background.wait()


@pytest.mark.parametrize("lost", [False, True])
def test_what_fails_on_another_rank_fails_here(monkeypatch, lost):
    def gather(outcome, world, group):
        if lost:
            raise RuntimeError("Connection closed by peer")
        return [outcome, {"error": "rank 1: disk full"}]

    monkeypatch.setattr("limbeck.train.background.gather_json", gather)
    monkeypatch.setattr("limbeck.train.background.dist.new_group", lambda **options: None)
    background = BackgroundWork(World(0, 2, ALONE.device))
    with pytest.raises(LimbeckError, match="another rank has ended" if lost else "rank 1: disk full"):
        background.together(lambda: 5)
