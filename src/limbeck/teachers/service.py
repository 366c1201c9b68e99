"""A teacher service: a teacher that outlives runs, which find it under its name.

Its ranks hold whole copies. The ranks of a sharded teacher run every forward pass together, which several runs at once
cannot coordinate.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

from limbeck.cluster.calls import Poll, WorkerLost, no_poll, result
from limbeck.cluster.environment import worker_environment
from limbeck.cluster.groups import GroupSpec, WorkerGroup, registered_groups
from limbeck.cluster.health import HealthMonitor
from limbeck.cluster.placement import describe_devices, place
from limbeck.cluster.session import can_join, ray_address, ray_session
from limbeck.config import DistillConfig
from limbeck.config.schema import SERVICE_NAME
from limbeck.errors import LimbeckError, Stopped
from limbeck.interrupt import ENDS, stop_requests
from limbeck.strategies.base import dims_of
from limbeck.teachers.fingerprint import check_fingerprint
from limbeck.teachers.worker import TeacherWorker

Log = Callable[[str], None]

_POLL_SECONDS = 0.2
_DEFAULT_NAME = "teacher"


def serve_teacher(config: DistillConfig, name: str | None = None, log: Log = print) -> None:
    """Serve the teacher of ``config`` until SIGINT or SIGTERM, then end its processes.

    Without RAY_ADDRESS a Ray is started here that other programs can join, with room for as many more workers as this
    machine has cores.

    Args:
        name: the service's name; None: ``teacher.service``, else "teacher".
        log: receives the lines for the console.

    Raises:
        LimbeckError: for a user's mistake, and when a rank is lost for good.
    """
    name = name or config.teacher.service or _DEFAULT_NAME
    devices = config.teacher.device_mapping or [0]
    if not re.match(SERVICE_NAME, name):
        raise LimbeckError(
            f"--name {name!r} is not a valid service name; use letters, digits, dots, dashes and underscores."
        )
    check_servable(config)
    room = 0 if can_join() else os.cpu_count() or 1
    with stop_requests(ENDS) as early, ray_session(len(devices) + room) as where, stop_requests(ENDS) as stop:
        stop.signal = early.signal  # Ray cut off while it starts leaves processes behind
        log(f"{where} {describe_devices([devices])}")
        if name in registered_groups():
            raise LimbeckError(
                f"a teacher service named {name} is running already; choose another --name, or stop that one."
            )

        def poll() -> None:
            if stop.signal:
                raise Stopped(f"the teacher service {name} was stopped.", stop.signal)

        placement = place([devices], config.num_gpus_per_node, poll)
        logs = config.log_dir / "services" / name
        spec = GroupSpec(
            "teacher",
            TeacherWorker,
            (config.model_dump(mode="json"),),
            logs,
            worker_environment({**config.system_envs, **config.teacher.system_envs}, len(devices)),
            restarts=config.max_restarts,
            registered=name,
        )
        group = spec.start(placement, 0, poll)
        try:
            group.connect(config.teacher.backend_timeout, process_group=False)
            monitor = HealthMonitor(group)
            group.call("load", seconds=None)
            log(
                f"Serving {config.teacher.model_args.model_name_or_path} as {name} ({len(devices)} × teacher; logs: "
                f"{logs}). Runs reach it with RAY_ADDRESS={ray_address()} and teacher.service={name}; Ctrl-C ends it."
            )
            while registered_groups().get(name, 0) == len(devices):
                poll()
                for line in monitor.restarted():
                    log(line)
                time.sleep(_POLL_SECONDS)
            raise LimbeckError(
                f"the teacher service {name} has lost a worker more than {config.max_restarts} times; see its logs in {logs}."
            )
        except Stopped:
            pass
        except WorkerLost as lost:
            raise LimbeckError(f"the teacher service {name} cannot start: {lost}; see its logs in {logs}.") from lost
        finally:
            group.end()
            placement.free()
    log(f"The teacher service {name} has ended.")


def check_servable(config: DistillConfig) -> None:
    """Raise LimbeckError unless the teacher of ``config`` can serve several runs."""
    if not config.has_teacher:
        raise LimbeckError("there is no teacher to serve; set teacher_pretrain.")
    devices = config.teacher.device_mapping or [0]
    if dims_of(config.teacher, len(devices), "teacher").replica_size > 1:
        raise LimbeckError(
            f"teacher.device_mapping names {len(devices)} devices, over which the teacher would be sharded, and several runs "
            "cannot coordinate its ranks; set teacher.strategy_args.strategy_name: hf_infer for a whole copy on each, or "
            "name one device."
        )


def find_service(config: DistillConfig, poll: Poll = no_poll) -> WorkerGroup:
    """The workers of ``teacher.service``; the process must be connected to Ray.

    Raises LimbeckError if there is no such service, or it does not fit the run.
    """
    name = str(config.teacher.service)
    group = WorkerGroup.find("teacher", name, poll)
    if group is None:
        served = ", ".join(registered_groups()) or "none"
        raise LimbeckError(
            f"there is no teacher service named {name} on this Ray (services: {served}); start it with "
            f"`limbeck serve-teacher CONFIG --name {name}`."
        )
    group.connect(config.teacher.backend_timeout, process_group=False)
    served = group.actors[0].fingerprint.remote()
    check_fingerprint(name, result(served, "teacher-0", 60 * config.teacher.backend_timeout, poll), config)
    return group
