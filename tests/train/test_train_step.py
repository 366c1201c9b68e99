"""One step of the loop on one of several ranks, and what it keeps alive."""

import gc
import time
import weakref
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from strategies.engines import ALONE

from limbeck import DistillPipeline
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.world import World
from limbeck.train.build.run import Run, build_run
from limbeck.train.console import RunConsole
from limbeck.train.loop import train_inputs, train_step
from limbeck.train.saving import Saver


def as_rank(run: Run, rank: int, **sizes: int) -> Run:
    """The run as ``rank`` of several sees it; the others add nothing."""
    return replace(run, world=World(rank, 1, torch.device("cpu"), dims=ParallelDims(**sizes)))


@pytest.fixture
def run(configure):
    made = build_run(configure(max_steps=50, eval_steps=0), ALONE, ExitStack())
    yield made
    made.source.close()


def seed_of(run: Run, rank: int, **sizes: int) -> int:
    train_step(as_rank(run, rank, **sizes))
    return torch.initial_seed()


def test_dropout_differs_between_ranks_with_other_rows_only(run):
    data = [seed_of(run, rank, dp_shard=2) for rank in (0, 1)]
    tensor = [seed_of(run, rank, tp=2) for rank in (0, 1)]
    assert data[0] != data[1]
    assert tensor[0] == tensor[1] == data[0]


def test_taid_gets_the_divergence_and_the_progress_of_the_step(configure):
    run = build_run(configure(max_steps=8, eval_steps=0, kd_objective="taid"), ALONE, ExitStack())
    updates = []
    run = as_rank(run, 0, dp_shard=2, tp=2)
    run.taid = SimpleNamespace(update=lambda kd, progress: updates.append((kd.item(), progress)))
    train_step(run)
    run.source.close()
    line = run.metrics.line(0.0, True)
    # metrics were made for one rank, and divide by one
    assert updates == [(pytest.approx(line["train/train_distill_loss"] / 4), 1 / 8)]


@pytest.mark.slow
def test_a_micro_batch_is_freed_before_the_next_one_is_made(configure):
    run = build_run(
        configure(max_steps=2, eval_steps=0, **{"student.training_args.gradient_accumulation_steps": 3}),
        ALONE,
        ExitStack(),
    )
    step, signals = run.requests.take(0, 2)
    alive: list[weakref.ref] = []
    most = 0

    def future(batch):
        nonlocal most
        gc.collect()
        most = max(most, sum(reference() is not None for reference in alive))
        signal = real(batch)
        alive.append(weakref.ref(signal.hidden))
        return signal

    *_, real = signals
    for _ in run.engine.forward_backward(train_inputs(run, step, [future] * len(signals))):
        pass
    run.source.close()
    assert len(alive) == 3
    assert most == 0


def test_validating_and_saving_are_not_part_of_step_time(configure, monkeypatch):
    clock, save = time.perf_counter, Saver.save
    late = 0.0

    def slow(self, *args):
        nonlocal late
        late += 1000.0
        save(self, *args)

    monkeypatch.setattr("time.perf_counter", lambda: clock() + late)
    monkeypatch.setattr(Saver, "save", slow)
    result = DistillPipeline(configure(max_steps=4, save_steps=1, eval_steps=0, logging_steps=1)).run()
    assert result.metrics["time/step"] < 500
    assert late == 4000.0


def test_the_bar_advances_after_every_step(configure, monkeypatch):
    steps = []
    monkeypatch.setattr(RunConsole, "advance", lambda self, step: steps.append(step))
    DistillPipeline(configure(max_steps=3, save_steps=0, eval_steps=0, logging_steps=100)).run()
    assert steps == [1, 2, 3]
