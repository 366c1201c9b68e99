"""What losses, gradients and metrics are divided by when several ranks share a step."""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from strategies.engines import ALONE

from limbeck.data.batch import Batch, StepBatch, StepCounts
from limbeck.objectives import DistillationLoss
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.world import World
from limbeck.teachers import Signal
from limbeck.train.build.counts import reduce_counts
from limbeck.train.build.run import build_run
from limbeck.train.loop import train_inputs, train_step
from limbeck.train.metrics import StepMetrics, Timer
from limbeck.train.student import StudentLoss
from limbeck.train.validate import validate


class Equals(World):
    """One of several ranks, all of which have the same values."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(self.size)


def world_of(**sizes: int) -> Equals:
    dims = ParallelDims(**sizes)
    return Equals(0, dims.size, torch.device("cpu"), dims=dims)


def batch_of(rows: int = 2, time: int = 5) -> Batch:
    labels = torch.full((rows, time), -100)
    labels[:, 1:3] = 7
    return Batch.of(torch.ones(rows, time, dtype=torch.long), labels, None, rows * time)


def test_counts_are_summed_over_the_ranks_that_read_different_rows():
    step = StepBatch((), StepCounts(num_supervised=3, normalizer=2.5, num_tokens=7, num_slots=11))
    (reduced,) = reduce_counts([step], world_of(dp_replicate=2, dp_shard=3, tp=2, cp=2, pp=2))
    assert reduced.counts == StepCounts(num_supervised=18, normalizer=15.0, num_tokens=42, num_slots=66)


def test_every_step_keeps_its_own_counts():
    steps = [StepBatch((), StepCounts(n, float(n), 10 * n, 100 * n), aligned_share=n / 10) for n in (1, 2)]
    first, second = reduce_counts(steps, world_of(dp_shard=2))
    assert (first.counts, second.counts) == (StepCounts(2, 2.0, 20, 200), StepCounts(4, 4.0, 40, 400))
    assert (first.aligned_share, second.aligned_share) == (0.1, 0.2)
    assert reduce_counts(steps, ALONE) == steps
    assert reduce_counts([], world_of(dp_shard=2)) == []


def inputs_of(world: World, step: StepBatch, futures: list):
    run = SimpleNamespace(
        world=world,
        metrics=SimpleNamespace(timer=Timer(torch.device("cpu"))),
        compared_batch=lambda batch: ("compared", batch),
    )
    return train_inputs(run, step, futures), run


def test_a_rank_divides_by_its_part_of_the_counts():
    step = StepBatch((batch_of(), batch_of(3)), StepCounts(80, 40.0, 200, 400))
    made, _ = inputs_of(world_of(dp_replicate=2, dp_shard=2, cp=2, tp=3), step, [None, None])
    found = list(made)
    assert len(made) == len(found) == 2
    # Gradients are averaged over 2 · 2 · 2 ranks.
    assert {(one.normalizer, one.num_tokens, one.micro_batches) for one in found} == {(5.0, 25.0, 2)}
    assert [len(one.batch.labels) for one in found] == [2, 3]


def test_a_step_without_supervised_tokens_divides_by_one():
    step = StepBatch((batch_of(),), StepCounts(0, 0.0, 0, 10))
    (one,) = inputs_of(ALONE, step, [None])[0]
    assert (one.normalizer, one.num_tokens) == (1.0, 1.0)


def test_a_signal_is_awaited_with_the_compared_positions_when_its_micro_batch_is_made():
    step = StepBatch((batch_of(), batch_of()), StepCounts(8, 8.0, 20, 20))
    awaited, signal = [], Signal(None, None)

    def future(batch):
        awaited.append(batch)
        return signal

    made, run = inputs_of(ALONE, step, [None, future])
    iterator = iter(made)
    assert next(iterator).signal is None
    assert awaited == []
    assert next(iterator).signal is signal
    assert awaited == [("compared", step.micro_batches[1])]
    assert run.metrics.timer.read().keys() == {"teacher"}


def test_a_signal_for_every_micro_batch_is_required():
    step = StepBatch((batch_of(), batch_of()), StepCounts(8, 8.0, 20, 20))
    with pytest.raises(ValueError, match="shorter"):
        list(inputs_of(ALONE, step, [None])[0])


def loss_of(value: float) -> StudentLoss:
    return StudentLoss(DistillationLoss(*(torch.tensor(value) for _ in DistillationLoss._fields)))


def test_the_loss_of_a_line_is_the_mean_over_the_ranks_with_a_loss():
    # Each of 2 · 3 ranks with a loss divided by half of the count; the first pipeline stages have none.
    world = world_of(dp_shard=2, tp=3)
    metrics = StepMetrics(world)
    metrics.losses.add(loss_of(4.0))
    metrics.count(StepBatch((), StepCounts(1, 1.0, 1, 1)), torch.tensor(0.0))
    assert metrics.line(0.0, True)["train/loss"] == 4.0


def test_validation_divides_the_sums_of_all_ranks_by_the_tokens_of_all_rows():
    world, seen = world_of(dp_shard=2, tp=3), []

    def evaluate(inputs):
        seen.append((inputs.normalizer, inputs.num_tokens, inputs.signal, len(inputs.batch.labels)))
        return None if len(seen) == 3 else loss_of(10.0)

    # Counts of a validation batch are those of all ranks.
    steps = [
        StepBatch((batch_of(1), batch_of(2)), StepCounts(20, 20.0, 60, 60)),
        StepBatch((batch_of(3),), StepCounts(10, 10.0, 90, 90)),
    ]
    run = SimpleNamespace(
        world=world,
        data=SimpleNamespace(validation=steps),
        feature_labels=(),
        engine=SimpleNamespace(evaluate=evaluate),
        teacher=None,
        colocated=None,
    )
    line = validate(run)
    # Two losses of 10 on each of 6 ranks; the three tensor ranks of a group have the same.
    assert line == {name: pytest.approx(40 / 30) for name in ("val/loss", "val/ce", "val/student_entropy")} | {
        "student/val_loss": pytest.approx(40 / 30)
    }
    assert seen == [(1.0, 5.0, None, rows) for rows in (1, 2, 3)]


def test_validation_requests_signals_one_batch_ahead_or_all_in_one_turn():
    events = []

    class Teacher:
        def request(self, batch, spec):
            events.append(f"request {len(batch.labels)} {spec}")

            def future(on_device):
                events.append(f"await {len(on_device.labels)}")
                return Signal(None, None)

            return future

    class Colocated:
        @contextmanager
        def teacher_turn(self):
            events.append("turn begins")
            yield
            events.append("turn ends")

    steps = [StepBatch(tuple(batch_of(rows) for rows in (1, 2)), StepCounts(20, 20.0, 60, 60))]
    run = SimpleNamespace(
        world=ALONE, data=SimpleNamespace(validation=steps), feature_labels=(), teacher=Teacher(), colocated=None,
        engine=SimpleNamespace(evaluate=lambda inputs: loss_of(1.0)), signal_spec="spec",
    )  # fmt: skip
    assert {"val/kd", "val/teacher_entropy", "val/top1_agreement"} <= validate(run).keys()
    assert events == ["request 1 spec", "request 2 spec", "await 1", "await 2"]
    events.clear()
    run.colocated = Colocated()
    validate(run)
    assert events == ["turn begins", "request 1 spec", "request 2 spec", "turn ends", "await 1", "await 2"]


def test_validation_leaves_the_student_as_it_was(configure):
    run = build_run(configure(max_steps=2), ALONE, ExitStack())
    train_step(run)
    before = {name: tensor.clone() for name, tensor in run.engine.iter_weights()}
    first, second = validate(run), validate(run)
    run.source.close()
    assert first == second
    assert all(parameter.grad is None for parameter in run.engine.root.parameters())
    for name, tensor in run.engine.iter_weights():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
