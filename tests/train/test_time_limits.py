"""When a run saves or ends because of the time."""

import pytest
import torch
from strategies.engines import ALONE

from limbeck import DistillPipeline
from limbeck.config import DistillConfig
from limbeck.strategies.world import World
from limbeck.train.checkpoint import list_checkpoints
from limbeck.train.time_limits import TimeLimits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_save_is_due_when_the_last_one_is_old(configure):
    clock = Clock()
    limits = TimeLimits(configure(save_minutes=2), ALONE, clock)
    clock.now += 1000  # the models are loaded
    limits.training_starts()
    found = []
    for _ in range(9):
        clock.now += 50
        found.append(limits.save_is_due())
        if found[-1]:
            limits.saved()
    assert found == [False, False, True] * 3
    assert not TimeLimits(configure(), ALONE, clock).save_is_due()


def test_a_run_ends_while_a_step_and_a_save_still_fit(configure):
    """45 minutes are 2700 s; the longest step takes 300 s and the longest save 500 s."""
    clock = Clock()
    limits = TimeLimits(configure(**{"checkpoint_config.save_before": "00:45"}), ALONE, clock)
    clock.now += 400
    limits.training_starts()
    found = []
    for seconds in (300, *[200] * 8):
        clock.now += seconds
        found.append(limits.is_out_of_time(500.0))
    # After 700, 900, … 1900 s; at 1900 s and with 800 s more the limit is reached.
    assert found == [False] * 6 + [True] * 3


def test_all_ranks_follow_the_clock_of_the_main_process(configure, monkeypatch):
    clock, sent = Clock(), []
    monkeypatch.setattr(World, "max", lambda self, value: sent.append(value) or value)
    config = configure(save_minutes=1, **{"checkpoint_config.save_before": "00:01"})
    for rank in (0, 1):
        limits = TimeLimits(config, World(rank, 2, torch.device("cpu")), clock)
        clock.now += 90
        limits.save_is_due(), limits.is_out_of_time(0.0)
    assert sent == [1.0, 1.0, 0.0, 0.0]


def test_a_run_whose_time_is_over_saves_stops_and_goes_on(configure, tmp_path, capsys):
    short = {"save_steps": 0, "eval_steps": 0, "max_steps": 3}
    limited = DistillPipeline(configure(**short, **{"checkpoint_config.save_before": "00:01"})).run()
    assert (limited.step, limited.out_of_time, limited.stopped_by) == (1, True, 0)
    assert "Stopped by checkpoint_config.save_before = 00:01 after step 1" in capsys.readouterr().out
    result = DistillPipeline(configure(**short, save_minutes=1e-9, resume_from_checkpoint=True)).run()
    assert (result.step, result.out_of_time) == (3, False)
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [f"checkpoint-{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("limit", ["3:99", "1h", "90", "-1:00", "00:00", 750])
def test_a_limit_is_hours_and_minutes(configure, limit):
    with pytest.raises(Exception, match="write hours and minutes in quotes"):
        configure(**{"checkpoint_config.save_before": limit})
    assert isinstance(configure(**{"checkpoint_config.save_before": "100:00"}), DistillConfig)
