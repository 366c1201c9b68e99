"""The driver of a run on Ray: starts groups of workers, watches them, and restarts the run when one is lost.

A restarted run resumes from its last checkpoint, which gives the weights of an undisturbed run.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.cluster.calls import Poll, WorkerLost, result
from limbeck.cluster.environment import worker_environment
from limbeck.cluster.groups import GroupSpec, WorkerGroup, registered_groups
from limbeck.cluster.health import HealthMonitor, find_lost
from limbeck.cluster.placement import Placement, place
from limbeck.cluster.session import load_ray, ray_address, ray_has_ended
from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError, Stopped
from limbeck.interrupt import SAVES, StopRequest
from limbeck.launch.progress import ProgressMonitor
from limbeck.launch.workers import StudentWorker
from limbeck.strategies.base import dims_of
from limbeck.teachers.service import find_service
from limbeck.teachers.worker import TeacherWorker
from limbeck.train import checkpoint as checkpoints
from limbeck.train.build.sources import refuse_missing_files
from limbeck.train.result import RunResult

Log = Callable[[str], None]

_WATCH_SECONDS = 0.1
_LONGEST_WAIT = 60
_STOPPING_SECONDS = 600
_QUIET_SECONDS = 120  # without a step, after which the console names the workers that do not respond
_RESPONSE_SECONDS = 5
_KEEPING_SECONDS = 30


def refuse_backend(config: DistillConfig, device: str) -> None:
    """Raise LimbeckError for a transfer of signals that workers on such devices ("CPU" or "GPU") do not have."""
    backend = config.logits_transfer_backend
    if not config.transfers_directly or (backend == "gloo") == (device == "CPU"):
        return
    right = "gloo (or ray)" if device == "CPU" else "ipc+nccl or nccl-only (or ray)"
    raise LimbeckError(
        f"logits_transfer_backend = {backend} does not send from {device} to {device}, where the workers are; use {right}."
    )


class Driver:
    """Starts and restarts the worker groups of one run.

    Args:
        config: of the run.
        mappings: device numbers of the student's ranks, and of the teacher's if it has workers of its own.
        log: receives the lines for the console.
    """

    def __init__(self, config: DistillConfig, mappings: list[list[int]], log: Log) -> None:
        # The workers would refuse these too, but only after they have started.
        checkpoints.refuse_earlier_checkpoints(config.resume_from_checkpoint, config.checkpoint_dir)
        refuse_missing_files(config)
        self.config, self.mappings, self.log = config, mappings, log
        self.placement: Placement | None = None
        self.teachers: WorkerGroup | None = None
        self.students: WorkerGroup | None = None
        self.monitor: HealthMonitor | None = None  # of the teachers
        # Ranks that hold whole copies are independent, so Ray may restart one while the others continue.
        self.in_step = len(mappings) > 1 and dims_of(config.teacher, len(mappings[1]), "teacher").replica_size > 1

    def run(self, stop: StopRequest) -> RunResult:
        """Train to the end, with at most ``max_restarts`` restarts."""
        for attempt in range(self.config.max_restarts + 1):
            try:
                return self._attempt(restarted=attempt > 0, stop=stop)
            except WorkerLost as lost:
                self._recover(lost, attempt, stop)
        raise AssertionError("the loop above returns or raises")

    def end(self, *, keep_teachers: bool = False) -> None:
        """End every process of the run; ``keep_teachers`` keeps teachers that still respond."""
        if self.students is not None:
            self.students.end()
            self.students = None
        if self.teachers is not None and not (keep_teachers and self._teachers_respond()):
            self.teachers.end()
            self.teachers = None
        if self.teachers is None:
            self.monitor = None
        if self.teachers is None and self.placement is not None:
            self.placement.free()
            self.placement = None

    def _recover(self, lost: WorkerLost, attempt: int, stop: StopRequest) -> None:
        """End what is left, log the loss, and wait; raises if the run cannot go on."""
        config = self.config
        self._refuse_ended_service()
        groups = [group for group in (self.students, self.teachers) if group is not None]
        dead, unresponsive = find_lost(groups, _RESPONSE_SECONDS)
        what = "; ".join(dead or [str(lost).rstrip("."), *unresponsive])
        logs = f"see the workers' logs in {self._logs}"
        self.end(keep_teachers=not self._coupled and not stop.signal)
        if stop.signal:
            name = signal.Signals(stop.signal).name
            raise Stopped(f"{what}, while the run was stopping after {name}; {logs}.", stop.signal) from lost
        if attempt == config.max_restarts:
            raise LimbeckError(f"{what}, after {attempt} of {config.max_restarts} restarts; {logs}.") from lost
        wait = min(2**attempt, _LONGEST_WAIT)
        goes_on = "goes on from its last checkpoint" if self._has_checkpoint else "starts again from the beginning"
        self.log(f"{what}. The run {goes_on} in {wait} s (restart {attempt + 1} of {config.max_restarts}).")
        until = time.monotonic() + wait
        while time.monotonic() < until:
            self._poll_stop(stop, restarted=True)
            time.sleep(_WATCH_SECONDS)
        self._refuse_ended_service()  # whose workers may die a moment before it

    def _poll_stop(self, stop: StopRequest, *, restarted: bool) -> None:
        """Raise Stopped if a signal has arrived while there is no loop that could save and end."""
        if not stop.signal:
            return
        by = f"stopped by {signal.Signals(stop.signal).name} before {'it went on' if restarted else 'the first step'}"
        if restarted and self._has_checkpoint:
            raise Stopped(f"{by}; resume_from_checkpoint=true goes on from its last checkpoint.", stop.signal)
        raise Stopped(f"{by}; nothing was saved.", stop.signal)

    def _refuse_ended_service(self) -> None:
        """Raise LimbeckError if the teacher service, or the Ray that the run has joined, is gone."""
        service = self.config.teacher.service
        if ray_has_ended():
            self.students = self.teachers = self.placement = None  # all of them ended with it
            who = f"the Ray at {ray_address()} has ended" + (
                f", and with it the teacher service {service}" if service else ""
            )
        elif service is not None and service not in registered_groups():
            who = f"the teacher service {service} has ended"
        else:
            return
        how = (
            "goes on from its last checkpoint with resume_from_checkpoint=true"
            if self._has_checkpoint
            else "has saved nothing yet"
        )
        raise LimbeckError(f"{who}; start it again. The run {how}.")

    @property
    def _has_checkpoint(self) -> bool:
        return bool(checkpoints.list_checkpoints(self.config.checkpoint_dir))

    @property
    def _coupled(self) -> bool:
        """Whether teachers cannot go on when one of them, or a student, is lost."""
        return self.in_step or self.config.transfers_directly

    @property
    def _logs(self) -> Path:
        return self.config.log_dir / "workers"

    def _teachers_respond(self) -> bool:
        return self.monitor is not None and not self.monitor.unresponsive(_KEEPING_SECONDS)

    def _attempt(self, *, restarted: bool, stop: StopRequest) -> RunResult:
        config, poll = self.config, partial(self._poll_stop, stop, restarted=restarted)
        if restarted and self._has_checkpoint:
            config = config.model_copy(update={"resume_from_checkpoint": True})
        service = None if config.teacher.service is None else find_service(config, poll)
        if self.placement is None:
            try:
                self.placement = place(self.mappings, config.num_gpus_per_node, poll, config.generator_devices)
            except LimbeckError as error:
                if restarted and not isinstance(error, Stopped):  # a lost machine may come back
                    raise WorkerLost(str(error).rstrip(".")) from error
                raise
            refuse_backend(config, self.placement.device)
        if config.transfers_directly:
            import limbeck.teachers.channels.ray_direct  # noqa: F401  (workers get the transport from this process)
        if self.teachers is None and len(self.mappings) > 1:
            restarts = 0 if self._coupled else config.max_restarts
            spec = self._spec("teacher", TeacherWorker, config, config.teacher.system_envs, restarts=restarts)
            self.teachers = spec.start(self.placement, 1, poll)
        spec = self._spec("student", StudentWorker, config, config.student.system_envs, concurrency=4)
        self.students = spec.start(self.placement, 0, poll)
        group = self.teachers or service
        teachers = () if group is None else group.actors
        if not restarted:
            self.log(f"Workers: {len(self.students.actors)} × student, {len(teachers)} × teacher; logs: {self._logs}")
        if self.teachers is not None:
            self.teachers.connect(config.teacher.backend_timeout, process_group=self.in_step)
        if group is not None and self.monitor is None:
            self.monitor = HealthMonitor(group)
        loading = [actor.load.remote() for actor in teachers]
        self.students.connect(config.student.backend_timeout)
        for rank, ref in enumerate(loading):
            result(ref, f"teacher-{rank}", 60 * config.teacher.backend_timeout, poll)
        if config.offloads_colocated and self.teachers is not None:
            self.teachers.call("offload", seconds=60 * config.teacher.backend_timeout)
        return self._watch(self.students, list(teachers), stop, poll)

    def _watch(self, students: WorkerGroup, teachers: list[Any], stop: StopRequest, poll: Poll) -> RunResult:
        ray = load_ray()
        runs = [actor.run.remote(teachers, self.in_step) for actor in students.actors]
        names = {ref: f"student-{rank}" for rank, ref in enumerate(runs)}
        waiting, stopping_since, quiet_logged = list(runs), 0.0, False
        timeout = 60 * self.config.student.backend_timeout
        progress = ProgressMonitor(students)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=_WATCH_SECONDS)
            for ref in done:
                result(ref, names[ref], None)
            for line in progress.poll():
                self.log(line)
            if not progress.latest.steps:  # the students still load, and there is nothing to save
                poll()
            else:
                stop.notice = SAVES
            if stop.signal and not stopping_since:
                stopping_since = time.monotonic()
                for actor in students.actors:
                    actor.stop.remote(stop.signal)
            if progress.quiet_seconds < _QUIET_SECONDS:
                quiet_logged = False
            elif not quiet_logged:
                quiet_logged = True
                self._log_unresponsive()
            self._log_restarted()
            if progress.stalled_seconds > timeout:
                raise WorkerLost(f"the student's workers have made no progress for {timeout:.0f} s")
            if stopping_since and time.monotonic() - stopping_since > _STOPPING_SECONDS:
                raise WorkerLost("the student's workers did not stop after the signal")
        if self.monitor is not None:
            self.monitor.unresponsive(_RESPONSE_SECONDS)
            self._log_restarted()
        for line in progress.last_lines():
            self.log(line)
        run: RunResult = result(runs[0], "student-0", None)
        return run

    def _log_restarted(self) -> None:
        for line in [] if self.monitor is None else self.monitor.restarted():
            self.log(line)

    def _log_unresponsive(self) -> None:
        """Name the teachers that do not respond. One whose machine is lost waits, in Ray, until there is room for
        it.
        """
        names = [] if self.monitor is None else self.monitor.unresponsive(_RESPONSE_SECONDS)
        if names:
            self.log(
                f"No step for {_QUIET_SECONDS:.0f} s: no response from {', '.join(names)}, which may be computing, or without "
                "a machine if its own is lost; the run waits until teacher.backend_timeout "
                f"({self.config.teacher.backend_timeout:g} minutes)."
            )

    def _spec(
        self,
        name: str,
        worker: Any,
        config: DistillConfig,
        role_environment: Mapping[str, str],
        *,
        restarts: int = 0,
        concurrency: int = 1,
    ) -> GroupSpec:
        if config.transfers_directly:
            milliseconds = str(round(60_000 * config.teacher.backend_timeout))
            role_environment = {"RAY_rdt_fetch_fail_timeout_milliseconds": milliseconds, **role_environment}
        environment = worker_environment({**config.system_envs, **role_environment}, sum(map(len, self.mappings)))
        return GroupSpec(
            name,
            worker,
            (config.model_dump(mode="json"),),
            self._logs,
            environment,
            concurrency=concurrency,
            restarts=restarts,
            direct=config.transfers_directly,
        )
