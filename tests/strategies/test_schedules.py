"""Learning-rate schedules against PyTorch's own."""

import pytest
import torch
from torch.optim import lr_scheduler

from limbeck.config.schema import TrainingArgs
from limbeck.strategies.optimizer import make_scheduler
from limbeck.train.build.run import _set_scheduler_step

RATE = 0.3
SEQUENCES = [
    ([{"name": "LinearLR", "start_factor": 0.1, "total_iters": 4}, {"name": "ConstantLR", "factor": 1.0}], [4]),
    ([{"name": "LinearLR"}, {"name": "CosineAnnealingLR", "T_max": 9, "eta_min": 0.02}], [3]),
    ([{"name": "ConstantLR", "factor": 0.5, "total_iters": 3}], []),
    (
        [
            {"name": "StepLR", "step_size": 2, "gamma": 0.7},
            {"name": "PolynomialLR", "total_iters": 5, "power": 2.0},
            {"name": "ExponentialLR", "gamma": 0.9},
        ],
        [5, 9],
    ),
]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


def rates(scheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def arguments(schedulers, milestones, interval: int = 1) -> TrainingArgs:
    kwargs = {"schedulers": schedulers, "milestones": milestones, "interval": interval}
    return TrainingArgs(learning_rate=RATE, lr_scheduler_type="sequential", lr_scheduler_kwargs=kwargs)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's own SequentialLR passes the epoch that it deprecates
@pytest.mark.parametrize(("schedulers", "milestones"), SEQUENCES)
def test_sequential_has_the_rates_of_pytorch(schedulers, milestones):
    expected = optimizer()
    parts = [
        getattr(lr_scheduler, one["name"])(expected, **{key: value for key, value in one.items() if key != "name"})
        for one in schedulers
    ]
    reference = lr_scheduler.SequentialLR(expected, parts, milestones) if milestones else parts[0]
    ours = make_scheduler(optimizer(), arguments(schedulers, milestones), total_steps=15)
    assert rates(ours, 15) == pytest.approx(rates(reference, 15), rel=1e-9)


def test_the_rate_is_a_function_of_the_step_and_the_interval():
    args = arguments(*SEQUENCES[0], interval=3)
    whole = rates(make_scheduler(optimizer(), args, total_steps=15), 15)
    assert whole[0:3] == [whole[0]] * 3
    assert whole[2] < whole[3] == whole[5]
    resumed = make_scheduler(optimizer(), args, total_steps=15)
    resumed.optimizer.step()
    _set_scheduler_step(resumed, 7)
    assert rates(resumed, 8) == whole[7:]
