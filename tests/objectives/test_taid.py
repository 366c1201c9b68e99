"""TAID's schedule against its published steps, written out with plain numbers."""

import math

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.objectives import Objective, TaidSchedule, divergence, fused_linear_distillation


def by_hand(losses, progress, t, end, rate, momentum):
    start, mean, previous, path = t, 0.0, math.inf, []
    for loss, share in zip(losses, progress, strict=True):
        if math.isinf(previous):
            step = 0.0
        else:
            mean = momentum * mean + (1 - momentum) * (previous - loss) / (previous + 1e-15)
            step = rate / (1 + math.exp(-mean)) * (1 - t)
        t = min(end, max(start + (end - start) * share, t + step))
        previous = loss
        path.append(t)
    return path


def test_the_schedule_takes_the_published_steps_and_resumes_exactly():
    losses = [2.0, 1.5, 1.6, 1.0, 0.9, 0.95, 0.4, 0.3]
    progress = [i / 20 for i in range(1, 9)]
    expected = by_hand(losses, progress, 0.3, 0.9, 0.2, 0.5)
    schedule, path = TaidSchedule(0.3, 0.9, 0.2, 0.5), []
    for i, (loss, share) in enumerate(zip(losses, progress, strict=True)):
        if i == 4:
            state, schedule = schedule.state(), TaidSchedule(0.3, 0.9, 0.2, 0.5)
            schedule.load_state(state)
        schedule.update(torch.tensor(loss), share)
        path.append(schedule.t.item())
    assert path == pytest.approx(expected, rel=1e-6)


def test_the_loss_reads_the_schedules_present_t():
    schedule = TaidSchedule(0.0)
    objective = Objective.of("taid", kd_weight=1.0, parameters={"t": schedule.t})
    q, p = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    head = torch.eye(6, dtype=torch.float64)
    run = lambda: fused_linear_distillation(q, head, p, head, torch.zeros(4, dtype=int), objective=objective).loss  # noqa: E731
    assert run().item() == pytest.approx(0, abs=1e-12)
    schedule.t.fill_(1.0)
    torch.testing.assert_close(run(), divergence("forward_kl")(q, p).mean())


def test_impossible_schedules_are_refused():
    with pytest.raises(LimbeckError, match="t_start <= t_end"):
        TaidSchedule(0.9, 0.5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_that_failed_does_not_move_the_schedule_for_good(broken):
    schedule, undisturbed = TaidSchedule(rate=0.1), TaidSchedule(rate=0.1)
    for value in (2.0, 1.5, 1.4):
        undisturbed.update(torch.tensor(value), 0.0)
    for value in (2.0, broken, 0.0, 1.5):
        schedule.update(torch.tensor(value), 0.0)
    assert 0.4 < schedule.t < 0.7 and abs(schedule.state()["mean"]) < 1
    assert 0.4 < undisturbed.t < 0.7
