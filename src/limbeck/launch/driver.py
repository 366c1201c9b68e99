"""A run on a cluster, seen from outside: two groups of workers are started and watched; when one is lost, the run goes on.

Nothing of the training itself is here. A run that loses a worker is started again from its last checkpoint, which gives what an
undisturbed run would have given, since a resumed run does.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from limbeck.cluster.environment import worker_environment
from limbeck.cluster.groups import HealthMonitor, Look, WorkerGroup, WorkerLost, find_lost, registered_groups, result
from limbeck.cluster.placement import Placement, place
from limbeck.cluster.session import load_ray, ray_address, ray_has_ended
from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError, Stopped
from limbeck.interrupt import StopRequest
from limbeck.launch.workers import StudentWorker, TeacherWorker
from limbeck.teachers.service import find_service
from limbeck.train import checkpoint as files
from limbeck.train.build.sources import refuse_missing_files
from limbeck.train.result import RunResult

Tell = Callable[[str], None]

_WATCH_SECONDS = 0.1
_LONGEST_WAIT = 60
_STOPPING_SECONDS = 600
_QUIET_SECONDS = 120  # without a step, after which a person is told who keeps the run waiting
_ANSWERING_SECONDS = 5
_KEEPING_SECONDS = 30


def refuse_backend(config: DistillConfig, device: str) -> None:
    """Raise LimbeckError for a way of sending signals that workers on such devices ("CPU" or "GPU") do not have."""
    backend = config.logits_transfer_backend
    if not config.transfers_directly or (backend == "gloo") == (device == "CPU"):
        return
    right = "gloo (or ray)" if device == "CPU" else "ipc+nccl or nccl-only (or ray)"
    raise LimbeckError(
        f"logits_transfer_backend = {backend} does not send from {device} to {device}, where the workers are; use {right}."
    )


class Cluster:
    """The groups of one run, and how often they may be started again."""

    def __init__(self, config: DistillConfig, mappings: list[list[int]], tell: Tell) -> None:
        # What the workers would refuse too, but only once they have started.
        files.refuse_earlier_checkpoints(config.resume_from_checkpoint, config.checkpoint_dir)
        refuse_missing_files(config)
        self.config, self.mappings, self.tell = config, mappings, tell
        self.placement: Placement | None = None
        self.teachers: WorkerGroup | None = None
        self.students: WorkerGroup | None = None
        self.roll: HealthMonitor | None = None  # of the teachers
        # Ranks that hold whole copies owe each other nothing, so that Ray may replace one while the others go on.
        self.in_step = len(mappings) > 1 and len(mappings[1]) > 1
        given = config.teacher.strategy_args.strategy_config
        whole = config.teacher.strategy_args.strategy_name == "hf_infer" and given.ranks_of_a_model == 1
        self.in_step &= not whole

    def run(self, stop: StopRequest) -> RunResult:
        for attempt in range(self.config.max_restarts + 1):
            try:
                return self._attempt(again=attempt > 0, stop=stop)
            except WorkerLost as lost:
                self._end_with_service()
                groups = [group for group in (self.students, self.teachers) if group is not None]
                dead, silent = find_lost(groups, _ANSWERING_SECONDS)
                what = "; ".join(dead or [str(lost).rstrip("."), *silent])
                logs = f"see the workers' logs in {self._logs}"
                self.end(keep_teachers=not self._must_stay_together and not stop.signal)
                if stop.signal:
                    raise Stopped(
                        f"{what}, while the run was stopping after {signal.Signals(stop.signal).name}; {logs}.",
                        stop.signal,
                    ) from lost
                if attempt == self.config.max_restarts:
                    raise LimbeckError(
                        f"{what}, after {attempt} of {self.config.max_restarts} restarts; {logs}."
                    ) from lost
                wait = min(2**attempt, _LONGEST_WAIT)
                saved = files.list_checkpoints(self.config.checkpoint_dir)
                goes_on = "goes on from its last checkpoint" if saved else "starts again from the beginning"
                self.tell(
                    f"{what}. The run {goes_on} in {wait} s (restart {attempt + 1} of {self.config.max_restarts})."
                )
                until = time.monotonic() + wait
                while time.monotonic() < until:
                    self._look(stop, again=True)
                    time.sleep(_WATCH_SECONDS)
                self._end_with_service()  # whose workers may die a moment before it
        raise AssertionError("the loop above returns or raises")

    def _look(self, stop: StopRequest, *, again: bool) -> None:
        """Raise Stopped if a signal has come, while there is no loop that could save and end."""
        if not stop.signal:
            return
        by = f"stopped by {signal.Signals(stop.signal).name} before {'it went on' if again else 'the first step'}"
        if again and files.list_checkpoints(self.config.checkpoint_dir):
            raise Stopped(f"{by}; resume_from_checkpoint=true goes on from its last checkpoint.", stop.signal)
        raise Stopped(f"{by}; nothing was saved.", stop.signal)

    def _end_with_service(self) -> None:
        """Raise LimbeckError if the teacher service, or the Ray that the run has joined, is gone."""
        service, gone = self.config.teacher.service, ray_has_ended()
        if gone:
            self.students = self.teachers = self.placement = None  # all of them have ended with it
            who = f"the Ray at {ray_address()} has ended" + (
                f", and with it the teacher service {service}" if service else ""
            )
        elif service is not None and service not in registered_groups():
            who = f"the teacher service {service} has ended"
        else:
            return
        saved = files.list_checkpoints(self.config.checkpoint_dir)
        how = "goes on from its last checkpoint with resume_from_checkpoint=true" if saved else "has saved nothing yet"
        raise LimbeckError(f"{who}; start it again. The run {how}.")

    @property
    def _must_stay_together(self) -> bool:
        """Whether teachers cannot go on when one of them, or a student, is lost."""
        return self.in_step or self.config.transfers_directly

    @property
    def _logs(self) -> Any:
        return self.config.log_dir / "workers"

    def end(self, *, keep_teachers: bool = False) -> None:
        """End every process of the run; ``keep_teachers`` leaves teachers that still answer."""
        if self.students is not None:
            self.students.end()
            self.students = None
        if self.teachers is not None and not (keep_teachers and self._teachers_answer()):
            self.teachers.end()
            self.teachers = None
        if self.teachers is None:
            self.roll = None
        if self.teachers is None and self.placement is not None:
            self.placement.free()
            self.placement = None

    def _teachers_answer(self) -> bool:
        return self.roll is not None and not self.roll.silent(_KEEPING_SECONDS)

    def _attempt(self, *, again: bool, stop: StopRequest) -> RunResult:
        config, look = self.config, partial(self._look, stop, again=again)
        if again and files.list_checkpoints(config.checkpoint_dir):
            config = config.model_copy(update={"resume_from_checkpoint": True})
        service = None if config.teacher.service is None else find_service(config, look)
        if self.placement is None:
            try:
                self.placement = place(self.mappings, config.num_gpus_per_node, look)
            except LimbeckError as error:
                if again and not isinstance(error, Stopped):  # what was lost may come back
                    raise WorkerLost(str(error).rstrip(".")) from error
                raise
            refuse_backend(config, self.placement.device)
        start = partial(
            WorkerGroup.start,
            arguments=[config.model_dump(mode="json")],
            placement=self.placement,
            log_dir=self._logs,
            direct=config.transfers_directly,
            look=look,
        )
        if self.teachers is None and len(self.mappings) > 1:
            self.teachers = start(
                "teacher",
                TeacherWorker,
                which=1,
                environment=self._environment(config.teacher.system_envs),
                restarts=0 if self._must_stay_together else config.max_restarts,
            )
        self.students = start(
            "student", StudentWorker, which=0, environment=self._environment(config.student.system_envs), threads=4
        )
        asked = self.teachers or service
        teachers = () if asked is None else asked.actors
        if not again:
            self.tell(f"Workers: {len(self.students.actors)} × student, {len(teachers)} × teacher; logs: {self._logs}")
        if self.teachers is not None:
            self.teachers.meet(config.teacher.backend_timeout, together=self.in_step)
        if asked is not None and self.roll is None:
            self.roll = HealthMonitor(asked)
        loading = [actor.load.remote() for actor in teachers]
        self.students.meet(config.student.backend_timeout)
        for rank, ref in enumerate(loading):
            result(ref, f"teacher-{rank}", 60 * config.teacher.backend_timeout, look)
        if config.offloads_colocated and self.teachers is not None:
            self.teachers.call("rest", seconds=60 * config.teacher.backend_timeout)
        return self._watch(self.students, list(teachers), stop, look)

    def _watch(self, students: WorkerGroup, teachers: list[Any], stop: StopRequest, look: Look) -> RunResult:
        ray = load_ray()
        runs = [actor.run.remote(teachers, self.in_step) for actor in students.actors]
        ranks = {ref: f"student-{rank}" for rank, ref in enumerate(runs)}
        waiting, sign_of_life, asked_to_stop = list(runs), time.monotonic(), 0.0
        hung = 60 * self.config.student.backend_timeout
        told, made, asked_why = students.actors[0].told.remote(), 0, False
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=_WATCH_SECONDS)
            for ref in done:
                result(ref, ranks[ref], None)
            if ray.wait([told], timeout=0)[0]:
                steps, lines = result(told, "student-0", None)
                if lines or steps > made:
                    sign_of_life, made, asked_why = time.monotonic(), steps, False
                for line in lines:
                    self.tell(line)
                told = students.actors[0].told.remote()
            if not made:  # the students still load, and there is nothing to save
                look()
            if stop.signal and not asked_to_stop:
                asked_to_stop = time.monotonic()
                for actor in students.actors:
                    actor.stop.remote(stop.signal)
            if time.monotonic() - sign_of_life > _QUIET_SECONDS and not asked_why:
                asked_why = True
                self._tell_who_is_silent()
            self._tell_who_is_back()
            if time.monotonic() - sign_of_life > hung:
                raise WorkerLost(f"the student's workers have made no step and said nothing for {hung:.0f} s")
            if asked_to_stop and time.monotonic() - asked_to_stop > _STOPPING_SECONDS:
                raise WorkerLost("the student's workers did not stop when asked to")
        if self.roll is not None:
            self.roll.silent(_ANSWERING_SECONDS)
            self._tell_who_is_back()
        for last in (told, students.actors[0].told.remote()):
            for line in result(last, "student-0", 60)[1]:
                self.tell(line)
        return result(runs[0], "student-0", None)

    def _tell_who_is_back(self) -> None:
        for line in [] if self.roll is None else self.roll.started_again():
            self.tell(line)

    def _tell_who_is_silent(self) -> None:
        """Say which teachers do not answer. One whose machine is lost is waited for, by Ray, until there is room for it."""
        silent = [] if self.roll is None else self.roll.silent(_ANSWERING_SECONDS)
        if silent:
            names = ", ".join(silent)
            self.tell(
                f"No step for {_QUIET_SECONDS:.0f} s: no answer from {names}, which may be at work, or without a machine if "
                "its own is lost; it is waited for until teacher.backend_timeout "
                f"({self.config.teacher.backend_timeout:g} minutes)."
            )

    def _environment(self, of_role: Mapping[str, str]) -> dict[str, str]:
        if self.config.transfers_directly:
            patience = str(round(60_000 * self.config.teacher.backend_timeout))
            of_role = {"RAY_rdt_fetch_fail_timeout_milliseconds": patience, **of_role}
        return worker_environment({**self.config.system_envs, **of_role}, sum(map(len, self.mappings)))
