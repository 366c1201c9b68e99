"""The optimizer and the learning-rate schedule that a configuration describes."""

import math

import pytest
import torch

from limbeck.config.schema import TrainingArgs
from limbeck.strategies.optimizer import make_optimizer, make_scheduler
from strategies.engines import make_root


def test_weight_decay_acts_on_matrices_only_and_frozen_parameters_are_left_out():
    root = make_root()
    optimizer = make_optimizer(root, TrainingArgs(weight_decay=0.3))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {p: 0.3 if p.ndim == 2 else 0.0 for p in root.parameters() if p.requires_grad}
    assert decay == expected
    assert len(expected) < len(list(root.parameters()))


def test_a_module_of_matrices_alone_has_one_group():
    optimizer = make_optimizer(torch.nn.Linear(2, 2, bias=False), TrainingArgs(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]


def test_learning_rate_betas_and_epsilon_are_those_of_the_configuration():
    args = TrainingArgs(learning_rate=0.25, adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=0.125)
    for group in make_optimizer(make_root(), args).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 0.125)


def rates(args: TrainingArgs, steps: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = make_optimizer(make_root(), args)
    scheduler, found = make_scheduler(optimizer, args, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_steps_win_over_the_ratio():
    args = TrainingArgs(learning_rate=1.0, warmup_steps=2, warmup_ratio=0.5)
    assert rates(args, 10) == pytest.approx([0.0, 0.5] + [(10 - step) / 8 for step in range(2, 10)])


def test_a_ratio_of_the_steps_is_rounded_to_the_nearest():
    # 0.26 · 10 = 2.6 steps, so three.
    args = TrainingArgs(learning_rate=1.0, warmup_ratio=0.26, lr_scheduler_type="constant_with_warmup")
    assert rates(args, 10) == pytest.approx([0.0, 1 / 3, 2 / 3] + [1.0] * 7)


def test_arguments_of_the_schedule_reach_it():
    args = TrainingArgs(
        learning_rate=1.0, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.25}
    )
    expected = [0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates(args, 10) == pytest.approx(expected)
