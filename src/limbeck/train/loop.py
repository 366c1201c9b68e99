"""The loop: a batch goes to the teacher, its signal and the batch to the student, the gradient to the optimizer.

Every rank runs this same loop. How data is made, a model spread, a signal sent or a folder written is decided elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from math import ceil, isfinite
from pathlib import Path
from typing import Any, TextIO

import torch

from limbeck.config import DistillConfig
from limbeck.data.batch import Batch, StepBatch
from limbeck.errors import LimbeckError
from limbeck.interrupt import StopRequest, stop_requests
from limbeck.models import explain_oom, has_lora, merged_state_dict
from limbeck.models.logs import configure_logging
from limbeck.strategies.host_memory import keep_freed_pages
from limbeck.strategies.optimizer import make_scheduler
from limbeck.strategies.pipeline_engine import PipelineEngine
from limbeck.strategies.torch_engine import TorchEngine
from limbeck.strategies.world import World, start_world
from limbeck.teachers import RemoteTeacher, SignalFuture, Teacher
from limbeck.train import checkpoint as files
from limbeck.train.build.data import Data, make_data
from limbeck.train.build.models import (
    DTYPES,
    check_strategies,
    check_teacher,
    layout_of,
    make_engine,
    make_objective,
    make_student,
    make_teacher,
    resolve_parallelism,
    signal_spec,
)
from limbeck.train.build.sources import refuse_missing_files
from limbeck.train.build.teacher_tokens import translate
from limbeck.train.colocated_offload import ColocatedOffload
from limbeck.train.console import RunConsole
from limbeck.train.metrics import LossSums, StepMetrics
from limbeck.train.request_pipeline import RequestPipeline, prefetch_requests
from limbeck.train.result import RunResult
from limbeck.train.student import StudentLoss
from limbeck.train.trackers import MetricsFile, Tracker, check_tracker, make_tracker

_LESS_TO_LOAD = (
    "give student and teacher devices of their own (teacher.device_mapping), use more devices with fsdp2_train and "
    "fsdp2_infer, or smaller models"
)
_LESS_TO_TRAIN = (
    "lower student.training_args.per_device_train_batch_size or sequence_length, set "
    "student.model_args.disable_gradient_checkpointing: false, or use more devices"
)
_ROOT = "model."  # the student inside StudentWithLoss

FindTeacher = Callable[[DistillConfig, World, Data], Teacher]


class DistillPipeline:
    """One distillation run, from a configuration to a saved student."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config

    def run(self) -> RunResult:
        """Train to the end, or until a signal asks to stop; either way a whole checkpoint is left. Resumes if configured."""
        os.environ.update(self.config.environment)
        ranks = len(self.config.device_mapping or [0])
        if self.config.device_mapping and int(os.environ.get("WORLD_SIZE", "1")) != ranks:
            raise LimbeckError(
                f"student.device_mapping names {ranks} devices, but this is one of {os.environ.get('WORLD_SIZE', '1')} "
                "processes; start it with `limbeck train`, or with torchrun and as many processes."
            )
        if self.config.needs_worker_groups:
            raise LimbeckError(
                "the teacher is a service, or has other devices than the student, and a process alone cannot be both; start "
                "this configuration with `limbeck train`."
            )
        with start_world() as world:
            return self.run_in(world)

    def run_in(
        self,
        world: World,
        find_teacher: FindTeacher | None = None,
        stop: StopRequest | None = None,
        told: TextIO | None = None,
    ) -> RunResult:
        """The same as one rank of ``world``, which is there already.

        find_teacher: gives the teacher once the data is known; without it the student's own processes hold one. stop: asked
        instead of this process's signals. told: where the lines for a person go instead of standard output.
        """
        world = resolve_parallelism(self.config, world, teacher_here=find_teacher is None)
        configure_logging()
        if world.device.type == "cpu":
            keep_freed_pages()
        with explain_oom(f"rank {world.rank} loaded the models", _LESS_TO_LOAD):
            run = _Run(self.config, world, find_teacher, told)
        try:
            # Until here there is nothing to save, and a signal ends the process at once.
            signals = nullcontext(stop) if stop is not None else stop_requests()
            with signals as request, explain_oom(f"rank {world.rank} trained", _LESS_TO_TRAIN):
                return run.loop(request)
        finally:
            run.data.stream.close()


class _Run:
    """The state of a run on one rank."""

    def __init__(
        self, config: DistillConfig, world: World, find_teacher: FindTeacher | None, told: TextIO | None
    ) -> None:
        self.config, self.world, self.told = config, world, told
        self.output_dir = Path(config.output_dir)
        check_tracker(config.track_with)
        check_strategies(config)
        self._check_best_metric()
        refuse_missing_files(config)
        resume = files.find_resume(config.resume_from_checkpoint, config.checkpoint_dir)
        files.refuse_earlier_checkpoints(config.resume_from_checkpoint, config.checkpoint_dir)
        if resume is not None:
            _refuse_a_branch(resume, config.checkpoint_dir)
        objective, self.taid = make_objective(config, world.device)
        self.data = make_data(config, world)
        self.total_steps = _total_steps(config, self.data.stream.steps_per_epoch)
        self.teacher = self._find_teacher(find_teacher) if config.has_teacher else None
        self.student = make_student(config, world, self.data, self.teacher, objective, self.total_steps)
        self.wanted = signal_spec(config, self.student.vocab_size)
        self.num_parameters = self.student.num_parameters
        self.engine = make_engine(config, world, self.student)
        self.scheduler = make_scheduler(self.engine.optimizer, config.student.training_args, self.total_steps)
        self.dtype = DTYPES[config.student.model_args.dtype]
        self.features = self.student.features
        # Otherwise a teacher is only measured against, in validation.
        self.distils = config.distill_loss_weight > 0 or self.features is not None
        self.metrics = StepMetrics(world, self.features.labels if self.features else ())
        self.turns: ColocatedOffload | None = None
        if (
            config.offloads_colocated
            and isinstance(self.teacher, RemoteTeacher)
            and isinstance(self.engine, TorchEngine)
        ):
            self.turns = ColocatedOffload(self.engine, self.teacher, world)
        turn = self.turns.teachers if self.turns is not None and self.distils else None
        self.steps = RequestPipeline(self.data.stream, self._prepare, self._ask, turn, config.offload_interval)
        self.step = 0
        self.latest: dict[str, float] = {}
        self.resumed_from = resume
        if resume is not None:
            self._restore(files.load_checkpoint(resume))
        self.trackers = self._open_trackers()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def loop(self, stop: StopRequest) -> RunResult:
        config = self.config
        here = config.checkpoint_dir / f"checkpoint-{self.step}"
        saved = self.step if self.resumed_from is not None and here.is_dir() else -1
        stopped = 0
        told = RunConsole(config.exp_name, self.total_steps, self.step, enabled=self.world.is_main, file=self.told)
        with told as console:
            self._introduce(console)
            while self.step < self.total_steps and not stopped:
                self._train_step()
                stopped = int(self.world.max(stop.look()))
                ended = stopped or self.step == self.total_steps
                console.advance(self.step)
                due = config.save_steps and self.step % config.save_steps == 0
                if ended or due or self.step % config.logging_steps == 0:
                    line = self.metrics.line(self.learning_rate, self.teacher is not None and self.distils)
                    self._log(console, line | self.transport_metrics())
                val_metrics: dict[str, float] = {}
                with self.metrics.aside():
                    judging = self.data.validation and config.eval_steps > 0 and not stopped
                    if judging and (ended or due or self.step % config.eval_steps == 0):
                        val_metrics = self._validate()
                        self._log(console, val_metrics)
                    if ended or due:
                        self._save(val_metrics)
                        saved = self.step
            if saved != self.step:
                self._save({})
            if stopped:
                console.say(
                    f"Stopped by {signal.Signals(stopped).name} after step {self.step}; "
                    f"resume_from_checkpoint=true goes on from there."
                )
        for tracker in self.trackers:
            tracker.close()
        return RunResult(config.checkpoint_dir / f"checkpoint-{self.step}", self.step, self.latest, stopped)

    def _train_step(self) -> None:
        timer = self.metrics.timer
        # A function of the step, not a state that is carried along: a resumed run draws the same dropout masks.
        torch.manual_seed(random.Random(f"{self.config.seed}/{self.step}/{self.world.data_rank}").getrandbits(63))
        with timer.section("data"):
            batch, answers = self.steps.take(more=self.total_steps - self.step - 1)
        kd = torch.zeros((), device=self.world.device)
        for loss in self._losses(batch, answers):
            self.metrics.losses.add(loss)
            kd += loss.distillation.kd
        with timer.section("optimizer"):
            self.student.finish_gradients()
            norm = self.engine.step()
            self.scheduler.step()
        self.step += 1
        if self.taid:
            self.taid.update(self.world.sum(kd) / self.world.losses, self.step / self.total_steps)
        self.metrics.count(batch, norm)

    def _losses(self, batch: StepBatch, answers: Sequence[SignalFuture | None]) -> Iterator[StudentLoss]:
        """Forward and backward of a step's micro-batches, with the losses that this rank computes."""
        timer, engine = self.metrics.timer, self.engine
        # Engines average gradients over the shares; dividing by a share of the count makes that the global mean.
        normalizer, tokens = ((count or 1.0) / self.world.grad_shares for count in (batch.normalizer, batch.num_tokens))
        waiting = []
        for micro_batch, answer in zip(batch.micro_batches, answers, strict=True):
            asked, micro = self._on_device(micro_batch)
            with timer.section("teacher"):
                signals = answer and answer(self._compared(asked))
            inputs = (micro, signals, normalizer, tokens, len(batch.micro_batches))
            if isinstance(engine, PipelineEngine):
                waiting.append(inputs)
                continue
            with timer.section("student"):
                loss = engine(*inputs)
                engine.backward(loss.loss, last=micro_batch is batch.micro_batches[-1])
            yield loss
        if isinstance(engine, PipelineEngine):  # which has several micro-batches under way at once
            with timer.section("student"):
                losses = engine.run(waiting)
            yield from losses

    def _divided(self, batch: Batch) -> tuple[Batch, Batch]:
        """What this rank needs the teacher's answer to, and what its student reads of the batch."""
        return batch.shard_for_context_parallel(self.world.context_rank, self.world.context)

    def _on_device(self, batch: Batch) -> tuple[Batch, Batch]:
        asked, own = self._divided(batch)
        there = asked.to(self.world.device)
        return there, there if own is asked else own.to(self.world.device)

    def _find_teacher(self, find: FindTeacher | None) -> Teacher:
        if find is not None:
            return find(self.config, self.world, self.data)
        teacher = make_teacher(self.config, self.world)
        if self.data.translator is None:  # which keeps to what the teacher's configuration says
            check_teacher(teacher, self.config, self.data.longest_row, self.data.largest_token)
        return teacher

    def _prepare(self, batch: StepBatch) -> StepBatch:
        if self.data.translator is None or not self.distils:
            return batch
        return translate([batch], self.data.translator, self.world)[0]

    def _ask(self, batch: Batch) -> SignalFuture | None:
        if not self.distils:
            return None
        return self._put(self._compared(batch))

    def _put(self, batch: Batch) -> SignalFuture | None:
        return None if self.teacher is None else self.teacher.ask(batch, self.wanted)

    def _asked_of_all(self, batches: Iterable[Batch]) -> Iterable[tuple[Batch, SignalFuture | None]]:
        """The batches of a validation with their answers."""
        if self.turns is None:
            return prefetch_requests(batches, self._put)
        with self.turns.teachers():
            return [(batch, self._put(batch)) for batch in batches]

    def _compared(self, batch: Batch) -> Batch:
        faults = self.student.faults
        return batch if faults is None else faults.compared(batch)

    def transport_metrics(self) -> dict[str, float]:
        return self.teacher.measured() if isinstance(self.teacher, RemoteTeacher) else {}

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return float(self.scheduler.get_last_lr()[0])

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Means over the supervised tokens of all held-out rows."""
        self.student.eval()
        sums = LossSums(self.world.device, self.features.labels if self.features else ())
        count = sum(batch.normalizer for batch in self.data.validation)
        tokens = sum(batch.num_tokens for batch in self.data.validation)
        batches = (micro for batch in self.data.validation for micro in batch.micro_batches)
        for micro_batch, answer in self._asked_of_all(batches):
            asked, micro = self._on_device(micro_batch)
            loss = self.engine(micro, answer and answer(asked), 1.0, tokens / (count or 1.0))
            if loss is not None:  # on the last stage of a pipeline
                sums.add(loss)
        self.student.train()
        means = sums.read(self.world, count * self.world.tensor)
        line = {"val/loss": means["loss"], "val/ce": means["ce"], "val/student_entropy": means["student_entropy"]}
        if self.teacher is not None:
            line |= {f"val/{name}": means[name] for name in ("kd", "teacher_entropy", "top1_agreement")}
        return {**line, "student/val_loss": means["ce"]}

    def _check_best_metric(self) -> None:
        known = ["val/loss", "val/ce", "val/student_entropy", "student/val_loss"]
        if self.config.has_teacher:
            known += ["val/kd", "val/teacher_entropy", "val/top1_agreement"]
        metric = self.config.checkpoint_config.best_metric
        if metric is not None and metric not in known:
            raise LimbeckError(
                f"checkpoint_config.best_metric = {metric!r} is not a metric of this run's validation; "
                f"use one of {', '.join(known)}."
            )

    # -- what is told -----------------------------------------------------------------------------------------------

    def _open_trackers(self) -> list[Tracker]:
        if not self.world.is_main:
            return []
        self.output_dir.mkdir(parents=True, exist_ok=True)
        config = self.config
        parameters = {"student": self.num_parameters}
        if self.teacher is not None:
            parameters["teacher"] = self.teacher.num_parameters
        facts = {
            "exp_name": config.exp_name,
            "student": config.student.model_args.model_name_or_path,
            "teacher": config.teacher.model_args.model_name_or_path,
            "limbeck_version": version("limbeck"),
            "parameters": parameters,
            "ranks": self.world.size,
            "device": str(self.world.device),
            "config": _shareable(config),
            "data": self.data.report,
        }
        (self.output_dir / "run.json").write_text(json.dumps(facts, indent=1))
        earlier = self.output_dir / "metrics.jsonl"
        if self.resumed_from is None and earlier.exists():
            earlier.replace(earlier.with_name("metrics.previous.jsonl"))
        other = make_tracker(config.track_with, config.log_dir, dict(config.tracker_kwargs))
        return [MetricsFile(self.output_dir / "metrics.jsonl"), *([other] if other else [])]

    def _introduce(self, console: RunConsole) -> None:
        console.say(self.data.report)
        console.say(
            f"{self.total_steps} steps of {self.config.student.training_args.per_device_train_batch_size} × "
            f"{self.config.student.training_args.gradient_accumulation_steps} × {self.world.data_size} rows on "
            f"{self.world.size} × {self.world.device.type}; output: {self.output_dir}"
        )
        if self.turns is not None:
            console.say(
                "Student and teacher share devices and take turns (is_offload_states): the teacher answers for "
                f"{self.config.offload_interval} steps at a time, then makes room."
            )
        for role, worker in (("student", self.config.student), ("teacher", self.config.teacher)):
            layout = layout_of(worker)
            if layout.together > 1 and (role == "student" or self.config.has_teacher):
                console.say(f"The {role}: {layout.told()}.")
        stages, turns = self.world.pipeline, self.config.student.training_args.gradient_accumulation_steps
        if stages > 1 and not self.config.student.use_dynamic_batching_in_train:
            console.say(
                f"With {turns} micro-batches a step each of the {stages} stages waits for the others for "
                f"{(stages - 1) / (turns + stages - 1):.0%} of the time; more gradient_accumulation_steps wait less."
            )
        if self.resumed_from is not None:
            console.say(f"Resumed from {self.resumed_from} at step {self.step}.")
            if self.step >= self.total_steps:
                console.say(f"It has all of the {self.total_steps} steps that are asked for; nothing is left to do.")
        elif self.config.resume_from_checkpoint:
            console.say(f"No checkpoint in {self.config.checkpoint_dir} yet: this is a new run.")

    def _log(self, console: RunConsole, line: dict[str, float]) -> None:
        broken = [name for name in ("train/loss", "val/loss") if not isfinite(line.get(name, 0.0))]
        if broken:
            raise LimbeckError(
                f"{broken[0]} is {line[broken[0]]} at step {self.step}: the run has diverged; lower "
                "student.training_args.learning_rate, or clip with max_grad_norm (checkpoints so far are as they were)."
            )
        line = {name: value for name, value in line.items() if isfinite(value)}  # JSON has no infinity
        self.latest |= line
        if "train/loss" in line:
            console.log(self.step, line)
        else:
            console.say("  ".join(f"{name} {value:.4f}" for name, value in line.items() if name.startswith("val/")))
        for tracker in self.trackers:
            tracker.log(self.step, line)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, val_metrics: Mapping[str, float]) -> None:
        folder, settings = self.config.checkpoint_dir, self.config.checkpoint_config
        # Projections of features stand beside the student: they are part of the run's masters and of no student's folder.
        whole = self.engine.gather_model()
        state = {name.removeprefix(_ROOT): tensor for name, tensor in whole.items() if name.startswith(_ROOT)}
        moments = self.engine.gather_optimizer()
        if self.world.is_main:
            trained = self.student.trained_names
            checkpoint = files.Checkpoint(
                self.step,
                {name.removeprefix(_ROOT): tensor for name, tensor in whole.items() if name in trained},
                moments,
                {
                    "data": self.steps.position,
                    "scaler": self.engine.scaler_state(),
                    "taid": self.taid.state() if self.taid else None,
                    "config": _shareable(self.config),
                },
                val_metrics.get(settings.best_metric) if settings.best_metric else None,
            )
            path = files.save_checkpoint(folder, checkpoint, lambda target: self._write_student(target, state))
            files.point(folder / "student", path)
            files.prune(folder, self.config.max_ckpt_to_keep, settings.best_mode)
            best = files.best_checkpoint(folder, settings.best_mode)
            if best is not None:
                files.point(folder / "best", best)
        self.world.wait()

    def _write_student(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        model, plain = self.student.model, state
        if has_lora(model):
            plain = merged_state_dict(model, state)
            model.save_pretrained(folder / "adapter", state_dict=state)
            model = model.get_base_model()
        tied = set(model.all_tied_weights_keys)
        weights = {name: tensor.to(self.dtype) for name, tensor in plain.items() if name not in tied}
        model.save_pretrained(folder, state_dict=weights)
        # save_pretrained writes the masters' dtype, whatever the dtype of the tensors that it is given.
        described = json.loads((folder / "config.json").read_text())
        described["dtype"] = str(self.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        self.data.tokenizer.save_pretrained(folder)

    def _restore(self, checkpoint: files.Checkpoint) -> None:
        self.step = checkpoint.step
        whole = {name.removeprefix(_ROOT): name for name in self.student.state_names}
        trained = {name.removeprefix(_ROOT) for name in self.student.trained_names}
        if trained & whole.keys() != checkpoint.masters.keys():
            odd = min((trained & whole.keys()) ^ checkpoint.masters.keys())
            raise LimbeckError(
                f"{self.resumed_from} was made with another student, other frozen parts or other features ({odd} differs)."
            )
        self.engine.scatter_model({whole[name]: tensor for name, tensor in checkpoint.masters.items()})
        self.engine.scatter_optimizer(checkpoint.optimizer)
        # The rate is a function of the step, so a longer or another schedule is entered at the right place.
        self.scheduler.load_state_dict(
            {**self.scheduler.state_dict(), "last_epoch": self.step - 1, "_step_count": self.step}
        )
        self.scheduler.step()
        self.engine.load_scaler_state(checkpoint.state["scaler"])
        self.data.stream.seek(checkpoint.state["data"])
        if self.taid:
            if not checkpoint.state.get("taid"):
                raise LimbeckError(
                    f"{self.resumed_from} was made with another objective than taid; set that one again."
                )
            self.taid.load_state(checkpoint.state["taid"])


def _refuse_a_branch(resume: Path, folder: Path) -> None:
    """Checkpoints later than the one to go on from belong to another future; mixed with this one's they would mislead."""
    existing = [path.resolve() for path in files.list_checkpoints(folder)]
    place = existing.index(resume.resolve()) + 1 if resume.resolve() in existing else 0
    later = [path for path in existing[place:] if files.find_damage(path) is None]
    if later:
        raise LimbeckError(
            f"{folder} also holds {', '.join(path.name for path in later)}, which a run from {resume} would be mixed with; "
            "set another output_dir, or move them away."
        )


def _total_steps(config: DistillConfig, steps_per_epoch: int) -> int:
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.num_train_epochs is not None:
        limits.append(ceil(config.num_train_epochs * steps_per_epoch))
    return min(limits)


def _shareable(config: DistillConfig) -> dict[str, Any]:
    """The configuration as it may be shown and uploaded: environment and tracker values can be tokens, so names only."""
    values = config.model_dump(mode="json")
    for section in (values["system_envs"], values["student"]["system_envs"], values["teacher"]["system_envs"]):
        section.update(dict.fromkeys(section, "(not shown)"))
    values["tracker_kwargs"] = dict.fromkeys(values["tracker_kwargs"], "(not shown)")
    return values
