"""The training loop: a step's micro-batches go to the teacher, signals and micro-batches to the engine, metrics to the
trackers.

Every rank runs this same loop. How steps are made, models distributed, signals transferred or checkpoints written is
decided behind protocols: ``StepSource``, ``Teacher``, ``Engine``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TextIO

import torch

from limbeck.config import DistillConfig
from limbeck.config.launcher import launched_processes
from limbeck.data.batch import Batch, StepBatch
from limbeck.errors import LimbeckError, StopTraining, WritingError
from limbeck.interrupt import SAVES, StopRequest, stop_requests
from limbeck.models import ModelSource, explain_oom, load_model
from limbeck.models.dtypes import DTYPES
from limbeck.models.logs import configure_logging
from limbeck.models.megatron_checkpoint import loading_flags, write_checkpoint
from limbeck.strategies.base import MicroBatches
from limbeck.strategies.host_memory import keep_freed_pages
from limbeck.strategies.world import World, start_world
from limbeck.teachers.protocol import SignalFuture, receive_signal
from limbeck.train.build.data import Progress
from limbeck.train.build.run import VALIDATES_FIRST, Run, build_run
from limbeck.train.build.student import resolve_parallelism
from limbeck.train.console import RunConsole
from limbeck.train.disk import FULL, explain_disk_errors
from limbeck.train.introduction import introduce
from limbeck.train.push import push_checkpoint
from limbeck.train.result import RunResult
from limbeck.train.run_lock import lock_run
from limbeck.train.student import TrainInput, to_device
from limbeck.train.time_limits import TimeLimits
from limbeck.train.validate import validation_metrics

_LESS_TO_LOAD = (
    "give student and teacher devices of their own (teacher.device_mapping), use more devices with fsdp2_train and "
    "fsdp2_infer, or smaller models"
)
_LESS_TO_TRAIN = (
    "lower student.training_args.per_device_train_batch_size or sequence_length, set "
    "student.model_args.disable_gradient_checkpointing: false, or use more devices"
)


Adapt = Callable[[DistillConfig, World], DistillConfig]


@dataclass(frozen=True)
class Surroundings:
    """What a rank gets from the program that started it, if that was not a launcher.

    workers: Ray actors of the teacher; in_step: whether these run every forward pass together. stop: polled instead of
    this process's signals. console: receives the lines for the console instead of standard output. progress: called
    with the number of rows tokenised.
    """

    workers: Sequence[object] = ()
    in_step: bool = False
    stop: StopRequest | None = None
    console: TextIO | None = None
    progress: Progress | None = None


class DistillPipeline:
    """One distillation run, from a configuration to a saved student.

    Args:
        config: of the run.
        adapt: completes what ``config`` leaves open, when the devices are known.
        notices: printed to stderr by the main process when everything is loaded, so that they do not hide an error.
        with_origin: adds the keys that the user wrote to a sentence about keys of ``config``.
    """

    def __init__(
        self,
        config: DistillConfig,
        adapt: Adapt = lambda config, world: config,
        notices: Sequence[str] = (),
        with_origin: Callable[[str], str] = str,
    ) -> None:
        self.config, self._adapt, self._notices, self._with_origin = config, adapt, notices, with_origin

    def run(self) -> RunResult:
        """Train to the end, or until SIGINT or SIGTERM; either way a whole checkpoint is left. Resumes if
        configured.
        """
        os.environ.update(self.config.environment)
        ranks, started = len(self.config.device_mapping or [0]), launched_processes() or 1
        if self.config.device_mapping and started != ranks:
            raise LimbeckError(
                f"student.device_mapping names {ranks} devices, but this is one of {started} "
                "processes; start it with `limbeck train`, or with torchrun and as many processes."
            )
        if self.config.needs_worker_groups:
            raise LimbeckError(
                "the teacher is a service, or has other devices than the student, and a single process cannot be both; start "
                "this configuration with `limbeck train`."
            )
        is_main = int(os.environ.get("RANK", "0")) == 0
        with lock_run(self.config) if is_main else nullcontext(), start_world() as world:
            return self.run_in(world)

    def run_in(self, world: World, surroundings: Surroundings | None = None) -> RunResult:
        """The same as one rank of ``world``, whose process group exists already."""
        configure_logging()
        given, config = surroundings or Surroundings(), self._adapt(self.config, world)
        limits = TimeLimits(config, world)
        world = resolve_parallelism(config, world, teacher_here=not given.workers)
        if world.device.type == "cpu":
            keep_freed_pages()
        with explain_disk_errors("a file of the run", config.checkpoint_dir, FULL), ExitStack() as resources:
            with explain_oom(f"rank {world.rank} loaded the models", _LESS_TO_LOAD):
                run = build_run(config, world, resources, given.workers, given.in_step, given.progress)
            for notice in self._notices if world.is_main else ():
                print(f"note: {notice}", file=sys.stderr)
            # Until here there is nothing to save, and a signal ends the process at once.
            signals = (
                nullcontext(given.stop) if given.stop is not None else stop_requests(SAVES if world.is_main else None)
            )
            with signals as stop, explain_oom(f"rank {world.rank} trained", _LESS_TO_TRAIN):
                try:
                    result = train(run, stop, given.console, limits, self._with_origin)
                except StopTraining:
                    if run.step > 0:
                        _save_for_megatron(config, world, run.step, given.console)
                    raise
        _save_for_megatron(config, world, result.step, given.console)
        completed = not (result.stopped_by or result.out_of_time)
        if completed and config.checkpoint_config.save_to_hub.repo_id is not None:
            _push(config, world, result, given.console)
        return result


def _save_for_megatron(config: DistillConfig, world: World, step: int, console_file: TextIO | None) -> None:
    """If configured, write the checkpoint of ``step`` as one of Megatron-LM from the main process, while the others wait."""
    if not config.checkpoint_config.save_megatron:
        return
    try:
        if world.is_main:
            source = ModelSource(str(config.checkpoint_dir / f"checkpoint-{step}"), "student")
            model = load_model(source, DTYPES[config.student.model_args.dtype])
            folder = config.checkpoint_dir / "megatron"
            form = config.checkpoint_config.megatron_format
            written = write_checkpoint(model, folder, step, config.tokenizer_name_or_path, form)
            print(
                f"Megatron-LM's checkpoint: {written}\nload it in Megatron-LM with {loading_flags(model.config)}",
                file=console_file,
                flush=True,
            )
    finally:
        world.barrier()


def _push(config: DistillConfig, world: World, result: RunResult, console_file: TextIO | None) -> None:
    """Upload the student from the main process, while the others wait."""
    try:
        if world.is_main:
            address = push_checkpoint(config.checkpoint_config.save_to_hub, result.student)
            print(f"uploaded to {address}", file=console_file, flush=True)
    except LimbeckError as error:
        raise LimbeckError(
            f"the student is saved in {result.student}, but not on the hub: {str(error).rstrip('.')}; "
            f"`limbeck push {result.student}` uploads it."
        ) from error
    finally:
        world.barrier()


def train(
    run: Run,
    stop: StopRequest,
    console_file: TextIO | None = None,
    limits: TimeLimits | None = None,
    with_origin: Callable[[str], str] = str,
) -> RunResult:
    """Train ``run`` from its current step to the end, until ``stop``, or until the time of ``limits`` is over."""
    config, world = run.config, run.world
    limits = limits or TimeLimits(config, world)
    current = config.checkpoint_dir / f"checkpoint-{run.step}"
    saved = run.step if run.resumed_from is not None and current.is_dir() else -1
    stopped, out_of_time, cut_short, settings = 0, False, False, config.effective_validation
    validates = (bool(run.data.validation) or run.rollout_validation is not None) and config.eval_steps > 0
    with RunConsole(config.exp_name, run.total_steps, run.step, enabled=world.is_main, file=console_file) as console:
        introduce(run, console)
        if validates and (run.validates_first or (settings.at_start and run.step == 0)):
            with run.metrics.exclude_from_timing(), _saves_before_error(run, saved):
                _validate(run, console)
        limits.training_starts()
        while run.step < run.total_steps and not cut_short:
            with _saves_before_error(run, saved):
                train_step(run)
            stopped = int(world.max(stop.poll()))
            out_of_time = run.step < run.total_steps and limits.is_out_of_time(run.saver.longest)
            cut_short = bool(stopped) or out_of_time
            ended = cut_short or run.step == run.total_steps
            console.advance(run.step)
            due = limits.save_is_due() or (config.save_steps and run.step % config.save_steps == 0)
            measured: dict[str, float] = {}
            if ended or due or run.step % config.logging_steps == 0:
                line = run.metrics.line(run.learning_rate, run.distils and run.teacher is not None)
                measured = run.log(console, line)
            with run.metrics.exclude_from_timing():
                at_end = ended and settings.at_end
                if validates and not cut_short and (at_end or due or run.step % config.eval_steps == 0):
                    with _saves_before_error(run, saved, {VALIDATES_FIRST: True}):
                        measured = measured | _validate(run, console)
                if ended or due:
                    run.saver.save(run.step, run.requests.state_dict(), measured)
                    saved = run.step
                    limits.saved()
        if saved != run.step:
            run.saver.save(run.step, run.requests.state_dict(), {})
        run.saver.wait()
        run.finish(console)
        if cut_short:
            limit = config.checkpoint_config.save_before
            reason = signal.Signals(stopped).name if stopped else f"checkpoint_config.save_before = {limit}"
            end = f"Stopped by {reason} after step {run.step}; resume_from_checkpoint=true goes on from there."
            console.print(with_origin(end))
    return RunResult(config.checkpoint_dir / f"checkpoint-{run.step}", run.step, run.latest, stopped, out_of_time)


@contextmanager
def _saves_before_error(run: Run, saved: int, more: Mapping[str, object] | None = None) -> Iterator[None]:
    """Save the last completed step, unless it is step ``saved``, before an error that ends the run on every rank.

    more: is saved with the position in the data.
    """
    state = run.requests.state_dict()  # a step that fails has moved the position in the data
    try:
        yield
    except (StopTraining, WritingError) as error:
        if run.step == 0:
            raise
        if run.step != saved:
            run.saver.save(run.step, {**state, **(more or {})}, {})
        run.saver.wait()
        if isinstance(error, StopTraining):
            raise
        raise LimbeckError(
            f"{error} The steps before, up to step {run.step}, are saved; resume_from_checkpoint: latest goes on from there."
        ) from error


def _validate(run: Run, console: RunConsole) -> dict[str, float]:
    found = run.log(console, validation_metrics(run, console))
    run.source.validated(found)
    return found


def train_step(run: Run) -> None:
    """One optimizer step."""
    timer, world = run.metrics.timer, run.world
    # A function of the step, not a carried state: a resumed run draws the same dropout masks.
    torch.manual_seed(random.Random(f"{run.config.seed}/{run.step}/{world.data_rank}").getrandbits(63))
    with timer.section("data"):
        batch, signals = run.requests.take(run.step, run.total_steps - run.step)
    kd = torch.zeros((), device=world.device)
    with timer.section("student"):
        for loss in run.engine.forward_backward(train_inputs(run, batch, signals)):
            run.metrics.losses.add(loss)
            kd += loss.distillation.kd
    with timer.section("data"):
        run.source.before_update()
    with timer.section("optimizer"):
        norm = run.engine.step()
        run.scheduler.step()
        if run.average is not None:
            run.average.update(run.student.iter_weights())
    run.step += 1
    with timer.section("data"):
        run.source.weights_changed(run.student.weights, run.step)
    if run.taid:
        run.taid.update(world.sum(kd) / world.dims.loss_ranks, run.step / run.total_steps)
    run.metrics.count(batch, norm)


def train_inputs(run: Run, batch: StepBatch, signals: Sequence[SignalFuture | None]) -> MicroBatches[TrainInput]:
    """The step's micro-batches on the device with their signals, each made when the engine is ready for it."""
    # Engines average gradients over the ranks; dividing by a part of the count makes that the global mean.
    parts = run.world.dims.gradient_parts
    normalizer, tokens = ((count or 1.0) / parts for count in (batch.normalizer, batch.num_tokens))
    count = len(batch.micro_batches)

    def make_input(micro_batch: Batch, future: SignalFuture | None) -> TrainInput:
        with run.metrics.timer.section("teacher"):
            whole, own = to_device(run.world, micro_batch)
            signal = receive_signal(future, run.compared_batch(whole))
        return TrainInput(own, signal, normalizer, tokens, count)

    def make_inputs() -> Iterator[TrainInput]:
        for micro_batch, future in zip(batch.micro_batches, signals, strict=True):
            yield make_input(micro_batch, future)  # no local keeps the last one alive while the next is made

    return MicroBatches(count, make_inputs)
