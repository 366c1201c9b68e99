"""Validation: means over the supervised tokens of all validation rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from limbeck.data.batch import Batch
from limbeck.teachers.protocol import SignalFuture, receive_signal
from limbeck.train.build.run import Run
from limbeck.train.console import RunConsole
from limbeck.train.metrics import LossSums
from limbeck.train.request_pipeline import prefetch_requests
from limbeck.train.student import TrainInput, to_device


def validation_metrics(run: Run, console: RunConsole) -> dict[str, float]:
    """All validation metrics of the current student. Collective.

    console: shows some of the answers, if the student writes any.
    """
    written = {} if run.rollout_validation is None else run.rollout_validation.run(run.step, console.print)
    return {**validate(run), **written}


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """The metrics of the validation rows with an answer, which need no writing; empty without such rows. Collective."""
    world, batches = run.world, run.data.validation
    if not batches:
        return {}
    sums = LossSums(world.device, run.feature_labels)
    count = sum(batch.normalizer for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    micro_batches = (micro for batch in batches for micro in batch.micro_batches)
    for micro_batch, future in _requested(run, micro_batches):
        whole, own = to_device(world, micro_batch)
        signal = receive_signal(future, whole)
        loss = run.engine.evaluate(TrainInput(own, signal, 1.0, tokens / (count or 1.0)))
        if loss is not None:  # a pipeline stage may have no part of it
            sums.add(loss)
    means = sums.read(world, count * world.dims.tp)
    line = {"val/loss": means["loss"], "val/ce": means["ce"], "val/student_entropy": means["student_entropy"]}
    if run.teacher is not None:
        line |= {f"val/{name}": means[name] for name in ("kd", "teacher_entropy", "top1_agreement")}
    return {**line, "student/val_loss": means["ce"]}


def _requested(run: Run, batches: Iterable[Batch]) -> Iterable[tuple[Batch, SignalFuture | None]]:
    """The batches with their future signals."""

    def request(batch: Batch) -> SignalFuture | None:
        return None if run.teacher is None else run.teacher.request(batch, run.signal_spec)

    if run.colocated is None:
        return prefetch_requests(batches, request)
    with run.colocated.teacher_turn():
        return [(batch, request(batch)) for batch in batches]
