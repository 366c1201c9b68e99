"""Builds everything that a run consists of, in the order in which mistakes are cheapest to find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from limbeck.config import DistillConfig
from limbeck.data.batch import Batch, StepBatch
from limbeck.errors import LimbeckError
from limbeck.objectives import TaidSchedule
from limbeck.registry import STEP_SOURCES, check_members
from limbeck.report import load_run, write_report
from limbeck.strategies.base import Engine, check_worker
from limbeck.strategies.optimizer import make_scheduler
from limbeck.strategies.world import World
from limbeck.teachers.connect import connect_teacher
from limbeck.teachers.protocol import SignalFuture, Teacher, TeacherContext
from limbeck.teachers.signals import SignalSpec
from limbeck.teachers.student_weights import AveragedTeacher
from limbeck.train.build.counts import reduce_counts
from limbeck.train.build.data import Data, Progress, make_data
from limbeck.train.build.early_checks import early_checks
from limbeck.train.build.objective import make_objective, make_objectives, signal_spec
from limbeck.train.build.student import Student, build_student
from limbeck.train.build.teacher_tokens import add_teacher_tokens
from limbeck.train.colocated_offload import ColocatedOffload
from limbeck.train.console import RunConsole
from limbeck.train.disk import explain_disk_errors
from limbeck.train.metrics import StepMetrics, check_best_metric
from limbeck.train.on_policy import OnPolicyLoss
from limbeck.train.push import make_repository
from limbeck.train.request_pipeline import RequestPipeline
from limbeck.train.resume import changed_settings
from limbeck.train.saving import Saver, find_checkpoint, shareable
from limbeck.train.step_source import StepSource, count_steps
from limbeck.train.student import LossSettings
from limbeck.train.trackers import BackgroundTracker, make_trackers
from limbeck.train.trackers.metrics_file import MetricsFile
from limbeck.train.validate_rollout import RolloutValidation
from limbeck.version import VERSION

VALIDATES_FIRST = "validates_first"
"""Added to the position in the data if the step of a checkpoint still has to be validated."""


@dataclass
class Run:
    """The state of a run on one rank.

    average: the teacher, if it is an average of the student's weights, which each step changes; else None.
    distils: signals are needed for training; otherwise a teacher is used in validation only. step: optimizer steps
    taken. metrics_file, trackers: on the main process. latest: the last value of every metric. changed: settings that
    differ from those of ``resumed_from``. validates_first: the run that wrote ``resumed_from`` ended in its validation.
    """

    config: DistillConfig
    world: World
    data: Data
    source: StepSource
    requests: RequestPipeline
    teacher: Teacher | None
    student: Student
    scheduler: Any
    saver: Saver
    metrics: StepMetrics
    signal_spec: SignalSpec
    taid: TaidSchedule | None
    average: AveragedTeacher | None
    colocated: ColocatedOffload | None
    rollout_validation: RolloutValidation | None
    distils: bool
    total_steps: int
    step: int = 0
    resumed_from: Path | None = None
    changed: Sequence[str] = ()
    validates_first: bool = False
    metrics_file: MetricsFile | None = None
    trackers: list[BackgroundTracker] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        """What trains the student."""
        return self.student.engine

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    @property
    def feature_labels(self) -> tuple[str, ...]:
        """Names of the compared pairs of intermediate features."""
        features = self.student.settings.features
        return features.labels if features else ()

    def compared_batch(self, batch: Batch) -> Batch:
        """The batch with the positions at which the divergence is taken; other than the supervised ones under a quirk
        only.
        """
        quirks = self.student.settings.quirks
        return batch if quirks is None else quirks.compared_batch(batch)

    def log(self, console: RunConsole, line: dict[str, float]) -> dict[str, float]:
        """Show and track one line of metrics, and return what was tracked. Raises LimbeckError if the loss is not finite."""
        broken = [name for name in ("train/loss", "val/loss") if not isfinite(line.get(name, 0.0))]
        if broken:
            raise LimbeckError(
                f"{broken[0]} is {line[broken[0]]} at step {self.step}: the run has diverged; lower "
                "student.training_args.learning_rate, or clip with max_grad_norm (checkpoints so far are as they were)."
            )
        if "train/loss" in line:
            of_source = self.source.metrics()
            line |= of_source | (self.teacher.metrics() if self.teacher is not None else {})
            apart = sum(seconds for name, seconds in of_source.items() if name.startswith("time/"))
            line["time/data"] = max(
                0.0, line["time/data"] - apart
            )  # the source is timed as data, unless the run only starts
        line = {name: value for name, value in line.items() if isfinite(value)}  # JSON has no infinity
        self.latest |= line
        if "train/loss" in line:
            console.log(self.step, line)
        else:
            console.print("  ".join(f"{name} {value:.4f}" for name, value in line.items() if name.startswith("val/")))
        if self.metrics_file is not None:
            with explain_disk_errors(f"the metrics of step {self.step}", self.config.checkpoint_dir):
                self.metrics_file.log(self.step, line)
        for tracker in self.trackers:
            tracker.log(self.step, line)
        self.show_notices(console)
        return line

    def show_notices(self, console: RunConsole) -> None:
        """Print what went wrong with the trackers."""
        for tracker in self.trackers:
            for notice in tracker.notices():
                console.print(f"note: {notice}")

    def finish(self, console: RunConsole) -> None:
        """Close the trackers, after those that take files have the report of the run."""
        if self.latest and any(tracker.takes_files for tracker in self.trackers):
            folder = Path(self.config.output_dir)
            try:
                run = load_run(folder)
                path = write_report([run], folder / "report.html", title=run.name)
            except OSError as error:  # the student is saved
                console.print(f"note: there is no report for the trackers: {error}")
            else:
                for tracker in self.trackers:
                    tracker.log_file(path)
        for tracker in self.trackers:
            tracker.close()
        self.show_notices(console)


def build_run(
    config: DistillConfig,
    world: World,
    resources: ExitStack,
    workers: Sequence[Any] = (),
    in_step: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Load and connect everything on one rank of ``world``, and resume if configured.

    Args:
        resources: closes the step source and the trackers when the run ends, also if it fails before the first step.
        workers: Ray actors of the teacher, if it has processes of its own; in_step: whether these run every pass
        together.
        progress: called with the number of rows tokenised so far.
    """
    if config.has_teacher and not workers:
        check_worker(config, "teacher", config.teacher, world.size, world.device.type)
    check_worker(config, "student", config.student, world.size, world.device.type)
    for check in early_checks(config, world):
        check()
    resume = find_checkpoint(config)
    objective, taid = make_objective(config, world.device)
    objectives = make_objectives(config, world.device)
    data = make_data(config, world, progress)
    source = _make_step_source(config, world, data)
    resources.callback(source.close)
    check_best_metric(config, world, source.metrics())
    rollout_validation = None
    if config.effective_validation.rollout is not None:
        rollout_validation = RolloutValidation(config, world, data, source)
    total_steps = count_steps(config, source)
    epochs = total_steps / (source.steps_per_epoch or 1)
    teacher = None
    if config.has_teacher:
        shares_tokenizer = data.translator is None
        context = TeacherContext(
            config,
            world,
            data.longest_for_teacher,
            data.largest_token,
            shares_tokenizer,
            workers,
            in_step,
            data.tokens * epochs,
        )
        teacher = connect_teacher(context)
    on_policy = OnPolicyLoss.from_config(config, world.device)
    settings = LossSettings(objective, 0, on_policy=on_policy, objectives=objectives)
    student = build_student(config, world, data, teacher, settings, epochs)
    average = teacher if isinstance(teacher, AveragedTeacher) else None
    spec = signal_spec(config, student.settings.vocab_size)
    distils = config.distils or student.settings.features is not None
    colocated = None
    if config.offloads_colocated and teacher is not None:
        colocated = ColocatedOffload(student.engine, teacher, world)

    def prepare(batch: StepBatch) -> StepBatch:
        (batch,) = reduce_counts([batch], world)
        if data.translator is None or not distils:
            return batch
        return add_teacher_tokens([batch], data.translator, world)[0]

    def request(batch: Batch) -> SignalFuture | None:
        return None if teacher is None or not distils else teacher.request(run.compared_batch(batch), spec)

    turn = colocated.teacher_turn if colocated is not None and distils else None
    training = config.student.training_args
    run = Run(
        config=config,
        world=world,
        data=data,
        source=source,
        requests=RequestPipeline(source, prepare, request, turn, config.offload_interval),
        teacher=teacher,
        student=student,
        scheduler=make_scheduler(student.engine.optimizer, training, total_steps),
        saver=Saver(config, world, student, data.tokenizer, taid, average),
        metrics=StepMetrics(
            world,
            student.settings.features.labels if student.settings.features else (),
            None if on_policy is None else on_policy.gap,
            has_topk=0 < config.logits_topk < spec.vocab_size,
            has_policy=config.has_policy_gradient,
        ),
        signal_spec=spec,
        taid=taid,
        average=average,
        colocated=colocated,
        rollout_validation=rollout_validation,
        distils=distils,
        total_steps=total_steps,
        resumed_from=resume,
    )
    resources.enter_context(run.saver)
    if average is not None and resume is None:
        average.load(student.iter_weights())
    if resume is not None:
        _restore(run, resume)
        _set_scheduler_step(run.scheduler, run.step)
    source.weights_changed(student.weights, run.step)
    if world.is_main:  # an upload that is not permitted is reported before the first step
        make_repository(config.checkpoint_config.save_to_hub)
    if world.is_main:
        with explain_disk_errors(f"run.json or the metrics in {config.output_dir}", config.checkpoint_dir):
            _open_trackers(run, resources)
    return run


def _make_step_source(config: DistillConfig, world: World, data: Data) -> StepSource:
    source: StepSource = STEP_SOURCES.get(config.effective_step_source)(config, world, data)
    members = (
        "max_lookahead",
        "steps_per_epoch",
        "next",
        "before_update",
        "weights_changed",
        "validated",
        "metrics",
        "state_dict",
        "load_state_dict",
        "close",
    )
    check_members(f"the step source of step_source = {config.effective_step_source}", source, members)
    return source


def _restore(run: Run, resume: Path) -> None:
    run.changed = changed_settings(resume, shareable(run.config))
    try:
        run.step, position = run.saver.restore(resume)
        run.validates_first = VALIDATES_FIRST in position
        run.source.load_state_dict(position)
    except LimbeckError as error:
        if not run.changed:
            raise
        raise LimbeckError("\n".join([str(error), "Changed since that checkpoint:", *run.changed])) from error


def _set_scheduler_step(scheduler: Any, step: int) -> None:
    """The rate is a function of the step, so a longer or another schedule is entered at the right place."""
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": step - 1, "_step_count": step})
    scheduler.step()


def _open_trackers(run: Run, resources: ExitStack) -> None:
    """Write ``run.json``, and open ``metrics.jsonl`` and the trackers."""
    config, output_dir = run.config, Path(run.config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    parameters = {"student": run.student.num_parameters}
    if run.teacher is not None:
        parameters["teacher"] = run.teacher.info.num_parameters
    facts = {
        "exp_name": config.exp_name,
        "student": config.student.model_args.model_name_or_path,
        "teacher": config.teacher.model_args.model_name_or_path or (config.teacher_source if run.teacher else None),
        "limbeck_version": VERSION,
        "parameters": parameters,
        "ranks": run.world.size,
        "device": str(run.world.device),
        "config": shareable(config),
        "data": run.data.report,
    }
    (output_dir / "run.json").write_text(json.dumps(facts, indent=1))
    earlier = output_dir / "metrics.jsonl"
    if run.resumed_from is None and earlier.exists():
        earlier.replace(earlier.with_name("metrics.previous.jsonl"))
    run.metrics_file = MetricsFile(output_dir / "metrics.jsonl")
    resources.callback(run.metrics_file.close)
    run.trackers = make_trackers(config.trackers, config.log_dir)
    for tracker in run.trackers:
        resources.callback(tracker.close)
