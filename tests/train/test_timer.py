"""Sections of a step exclude each other's time, and a line of metrics divides by what it says."""

import pytest
import torch
from strategies.engines import ALONE

from limbeck.data.batch import StepBatch, StepCounts
from limbeck.errors import LimbeckError
from limbeck.objectives import DistillationLoss
from limbeck.train.metrics import LossSums, StepMetrics, Timer, check_best_metric
from limbeck.train.student import StudentLoss


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def test_an_inner_section_pauses_the_outer_one(clock):
    timer = Timer(torch.device("cpu"))
    with timer.section("student"):
        clock.now += 1
        with timer.section("teacher"):
            clock.now += 10
            with timer.section("data"):
                clock.now += 100
            clock.now += 20
        clock.now += 2
    clock.now += 1000
    with timer.section("teacher"):
        clock.now += 3
    assert timer.read() == {"student": 3.0, "teacher": 33.0, "data": 100.0}
    assert timer.read() == {}


def test_a_section_that_raises_is_counted_and_closed(clock):
    timer = Timer(torch.device("cpu"))
    with timer.section("student"):
        with pytest.raises(ValueError, match="broken"), timer.section("teacher"):
            clock.now += 10
            raise ValueError("broken")
        clock.now += 2
    assert timer.read() == {"student": 2.0, "teacher": 10.0}


def step_of(tokens: int, supervised: int, slots: int, aligned: float | None = None) -> StepBatch:
    return StepBatch((), StepCounts(supervised, float(supervised), tokens, slots), aligned)


def loss_of(value: float, features: list[float] | None = None) -> StudentLoss:
    fields = {name: torch.tensor(value * (1 + i)) for i, name in enumerate(DistillationLoss._fields)}
    return StudentLoss(DistillationLoss(**fields), None if features is None else torch.tensor(features))


def test_a_line_has_means_over_its_steps_and_starts_anew(clock):
    metrics = StepMetrics(ALONE, has_topk=True, has_policy=True)
    for tokens, supervised, slots, norm in ((30, 10, 40, 1.0), (50, 20, 60, 4.0)):
        with metrics.timer.section("data"):
            clock.now += 1
        with metrics.timer.section("teacher"):
            clock.now += 2
        with metrics.timer.section("student"):
            clock.now += 3
        with metrics.timer.section("optimizer"):
            clock.now += 4
        metrics.losses.add(loss_of(0.5))
        metrics.losses.add(loss_of(1.0))
        metrics.count(step_of(tokens, supervised, slots), torch.tensor(norm))
    with metrics.exclude_from_timing():
        clock.now += 1000
    line = metrics.line(0.125, True)
    expected = {
        "train/loss": 1.5, "student/lr": 0.125, "student/grad_norm": 2.5, "train/tokens": 80.0,
        "train/supervised_tokens": 30.0, "train/tokens_per_second": 4.0, "train/padding_share": 0.2,
        "time/data": 1.0, "time/teacher": 2.0, "time/student": 3.0, "time/optimizer": 4.0, "time/step": 10.0,
        "train/teacher_forward": 2.0, "train/student_train_step": 7.0, "train/step_train": 10.0,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    order = {name: 1.5 * (1 + i) for i, name in enumerate(DistillationLoss._fields)}
    for name, metric in (
        ("ce", "train_student_loss"), ("kd", "train_distill_loss"), ("student_entropy", "student_entropy"),
        ("teacher_entropy", "teacher_entropy"), ("top1_agreement", "top1_agreement"), ("topk_mass", "topk_mass"),
        ("topk_overlap", "topk_overlap"), ("policy", "policy_loss"),
    ):  # fmt: skip
        assert line[f"train/{metric}"] == pytest.approx(order[name]), metric
    assert 0.01 < line["system/peak_memory_gb"] < 1000
    assert "train/aligned_share" not in line

    clock.now += 5
    metrics.count(step_of(10, 5, 10), torch.tensor(3.0))
    again = metrics.line(0.0, True)
    assert (again["train/tokens"], again["student/grad_norm"], again["time/step"]) == (10.0, 3.0, 5.0)
    assert (again["train/loss"], again["time/data"], again["train/padding_share"]) == (0.0, 0.0, 0.0)
    assert again.keys() == line.keys()  # a metric whose value is 0 stays
    plain = StepMetrics(ALONE)
    clock.now += 1
    assert line.keys() - plain.line(0.0, True).keys() == {"train/topk_mass", "train/topk_overlap", "train/policy_loss"}


def test_a_line_without_a_teacher_has_no_divergence(clock):
    metrics = StepMetrics(ALONE)
    metrics.losses.add(loss_of(1.0))
    metrics.count(step_of(10, 5, 10), torch.tensor(1.0))
    clock.now += 1
    line = metrics.line(0.0, False)
    assert not {"train/train_distill_loss", "train/teacher_entropy", "train/topk_mass"} & line.keys()


def test_the_aligned_share_is_weighted_by_the_supervised_tokens(clock):
    metrics = StepMetrics(ALONE)
    metrics.count(step_of(40, 30, 40, aligned=1.0), torch.tensor(0.0))
    metrics.count(step_of(20, 10, 20, aligned=0.5), torch.tensor(0.0))
    clock.now += 1
    assert metrics.line(0.0, True)["train/aligned_share"] == pytest.approx(35 / 40)
    metrics.count(step_of(40, 30, 40), torch.tensor(0.0))
    clock.now += 1
    assert "train/aligned_share" not in metrics.line(0.0, True)


def test_features_are_summed_by_pair_and_averaged_in_total(clock):
    metrics = StepMetrics(ALONE, ["one", "two"])
    for _ in range(2):
        metrics.losses.add(loss_of(1.0, [1.0, 3.0]))
    metrics.losses.add(loss_of(1.0))
    metrics.count(step_of(10, 5, 10), torch.tensor(0.0))
    clock.now += 1
    line = metrics.line(0.0, True)
    assert (line["train/features/one"], line["train/features/two"], line["train/features/total"]) == (2.0, 6.0, 4.0)


def test_sums_are_in_float64_and_start_again_when_read():
    sums = LossSums(torch.device("cpu"))
    for value in (1e8, 1.0):
        sums.add(loss_of(value))
    assert sums.read(ALONE, 1.0)["loss"] == 1e8 + 1
    assert sums.read(ALONE, 1.0)["loss"] == 0.0
    sums.add(loss_of(3.0))
    assert sums.read(ALONE, 2.0)["loss"] == 1.5


@pytest.mark.parametrize("name", [None, "val/loss", "student/val_loss", "train/loss", "rollout/reward"])
def test_a_best_metric_of_validation_training_or_the_source_is_accepted(configure, name):
    best = {"checkpoint_config.best_metric": name, "checkpoint_config.best_mode": "max"}
    check_best_metric(configure(**best), ALONE, ["rollout/reward"])


@pytest.mark.parametrize("name", ["val/kd", "val/teacher_entropy", "train/train_distill_loss"])
def test_a_best_metric_of_the_teacher_needs_one(configure, name):
    best = {"checkpoint_config.best_metric": name}
    check_best_metric(configure(**best), ALONE, ())
    alone = configure(**best, teacher_pretrain=None, distill_loss_weight=0.0)
    with pytest.raises(LimbeckError, match=f"{name}' is not a metric of this run; .*here are val/loss"):
        check_best_metric(alone, ALONE, ())
