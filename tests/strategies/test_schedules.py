"""Learning-rate schedules against PyTorch's own."""

import math

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


def megatron_rates(steps: int, warmup_steps: int = 4, **kwargs) -> list[float]:
    args = TrainingArgs(
        learning_rate=RATE,
        warmup_steps=warmup_steps,
        lr_scheduler_type="megatron",
        lr_scheduler_kwargs={"decay_steps": 12, "min_lr": 0.03, **kwargs},
    )
    return rates(make_scheduler(optimizer(), args, total_steps=steps), steps)


def test_megatron_warms_up_from_its_first_rate_decays_and_stays_at_its_smallest():
    """The published rules: warm-up to step 4, decay to step 12, then the smallest rate."""
    low, span = 0.03, RATE - 0.03
    expected = {
        "linear": lambda step: low + span * (1 - (step - 4) / 8),
        "cosine": lambda step: low + span * (1 + math.cos(math.pi * (step - 4) / 8)) / 2,
        "inverse-square-root": lambda step: RATE * math.sqrt(4 / step),
    }
    for style, rate in expected.items():
        found = megatron_rates(16, decay_style=style, warmup_init=0.1)
        assert found[:5] == pytest.approx([0.1 + (RATE - 0.1) * step / 4 for step in range(5)])
        assert found[5:13] == pytest.approx([rate(step) for step in range(5, 13)])
        assert found[13:] == pytest.approx([low] * 3)
    assert megatron_rates(16, decay_style="constant")[4:] == pytest.approx([RATE] * 12)
    assert megatron_rates(3, warmup_steps=0, decay_style="cosine")[0] == pytest.approx(RATE)


@pytest.mark.parametrize(
    ("style", "half"),
    [("exponential", 2 * 0.5**0.5 - 1), ("linear", 0.5), ("cosine", 0.5), ("minus_sqrt", 1 - 0.5**0.5)],
)
def test_megatrons_wsd_is_constant_until_its_last_steps(style, half):
    found = megatron_rates(14, decay_style="WSD", wsd_decay_style=style, wsd_decay_steps=4)
    assert found[4:9] == pytest.approx([RATE] * 5)
    assert found[10] == pytest.approx(0.03 + (RATE - 0.03) * half)
    assert found[12:] == pytest.approx([0.03] * 2)
