"""A teacher that outlives runs: kept here until somebody says stop, and found by runs under its name.

Its ranks are whole copies. A sharded teacher's ranks must all walk in step, which several runs at once could not see to.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

from limbeck.cluster.environment import worker_environment
from limbeck.cluster.groups import HealthMonitor, Look, WorkerGroup, WorkerLost, no_look, registered_groups, result
from limbeck.cluster.placement import describe_devices, place
from limbeck.cluster.session import can_join, ray_address, ray_session
from limbeck.config import DistillConfig
from limbeck.config.schema import SERVICE_NAME
from limbeck.errors import LimbeckError, Stopped
from limbeck.interrupt import stop_requests
from limbeck.launch.workers import TeacherWorker
from limbeck.teachers.fingerprint import check_fit

Tell = Callable[[str], None]

_LOOK_SECONDS = 0.2
_UNNAMED = "teacher"


def serve_teacher(config: DistillConfig, name: str | None = None, tell: Tell = print) -> None:
    """Keep the teacher of ``config`` at its devices until SIGINT or SIGTERM, then end its processes.

    name: what runs call it by; None: ``teacher.service``, else "teacher". Without RAY_ADDRESS a Ray is started here that
    others can join, with room for as many more workers as this machine has cores. Raises LimbeckError for a user's mistake,
    and when a rank is lost for good.
    """
    name = name or config.teacher.service or _UNNAMED
    devices = config.teacher.device_mapping or [0]
    if not re.match(SERVICE_NAME, name):
        raise LimbeckError(
            f"--name {name!r} is no name for a service; use letters, digits, dots, dashes and underscores."
        )
    check_servable(config)
    room = 0 if can_join() else os.cpu_count() or 1
    with stop_requests() as early, ray_session(len(devices) + room) as where, stop_requests() as stop:
        stop.signal = early.signal  # Ray cut off while it starts leaves processes behind
        tell(f"{where} {describe_devices([devices])}")
        if name in registered_groups():
            raise LimbeckError(f"a teacher service called {name} is there already; choose another --name, or end that.")

        def look() -> None:
            if stop.signal:
                raise Stopped(f"the teacher service {name} was stopped.", stop.signal)

        placement = place([devices], config.num_gpus_per_node, look)
        logs = config.log_dir / "services" / name
        group = WorkerGroup.start(
            "teacher",
            TeacherWorker,
            [config.model_dump(mode="json")],
            placement=placement,
            which=0,
            log_dir=logs,
            environment=worker_environment({**config.system_envs, **config.teacher.system_envs}, len(devices)),
            restarts=config.max_restarts,
            registered=name,
            look=look,
        )
        try:
            group.meet(config.teacher.backend_timeout, together=False)
            roll = HealthMonitor(group)
            group.call("load", seconds=None)
            tell(
                f"Serving {config.teacher.model_args.model_name_or_path} as {name} ({len(devices)} × teacher; logs: "
                f"{logs}). Runs reach it with RAY_ADDRESS={ray_address()} and teacher.service={name}; Ctrl-C ends it."
            )
            while True:
                look()
                for line in roll.started_again():
                    tell(line)
                time.sleep(_LOOK_SECONDS)
                if registered_groups().get(name, 0) < len(devices):
                    raise LimbeckError(
                        f"the teacher service {name} has lost a worker more than {config.max_restarts} times; see its logs "
                        f"in {logs}."
                    )
        except Stopped:
            pass
        except WorkerLost as lost:
            raise LimbeckError(f"the teacher service {name} cannot start: {lost}; see its logs in {logs}.") from lost
        finally:
            group.end()
            placement.free()
    tell(f"The teacher service {name} has ended.")


def check_servable(config: DistillConfig) -> None:
    """Raise LimbeckError unless the teacher of ``config`` can serve several runs."""
    if not config.has_teacher:
        raise LimbeckError("there is no teacher to serve; set teacher_pretrain.")
    devices = config.teacher.device_mapping or [0]
    if len(devices) > 1 and config.teacher.strategy_args.strategy_name != "hf_infer":
        raise LimbeckError(
            f"teacher.device_mapping names {len(devices)} devices, over which the teacher would be sharded, and several runs "
            "cannot keep its ranks in step; set teacher.strategy_args.strategy_name: hf_infer for a whole copy on each, or "
            "name one device."
        )


def find_service(config: DistillConfig, look: Look = no_look) -> WorkerGroup:
    """The workers that serve ``teacher.service``; the process must be connected to Ray. look: called while they are waited for.

    Raises LimbeckError when nobody serves it, or what is served does not fit the run.
    """
    name = str(config.teacher.service)
    group = WorkerGroup.find("teacher", name, look)
    if group is None:
        served = ", ".join(registered_groups()) or "none"
        raise LimbeckError(
            f"there is no teacher service called {name} on this Ray (served: {served}); start it with "
            f"`limbeck serve-teacher CONFIG --name {name}`."
        )
    group.meet(config.teacher.backend_timeout, together=False)
    first = group.actors[0].serves.remote()
    check_fit(name, result(first, "teacher-0", 60 * config.teacher.backend_timeout, look), config)
    return group
