"""The front door to a run on worker groups. It is light to import: while Ray starts, which is mostly waiting, PyTorch is
imported."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING

from limbeck.cluster.placement import describe_devices
from limbeck.cluster.session import can_join, load_ray, ray_session
from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError
from limbeck.interrupt import stop_requests

if TYPE_CHECKING:
    from limbeck.train.result import RunResult


def run_on_cluster(config: DistillConfig, tell: Callable[[str], None] = print) -> RunResult:
    """Train on worker groups to the end, or until a signal asks to stop. ``tell`` gets the lines for a person.

    Raises LimbeckError for a user's mistake, and after ``max_restarts`` lost workers; Stopped when the signal comes before
    there is anything to save.
    """
    mappings = [config.student.device_mapping or [0]]
    if config.teacher.service is not None and not can_join():
        raise LimbeckError(
            f"teacher.service = {config.teacher.service} is on a Ray that this run must join; set RAY_ADDRESS to what "
            "`limbeck serve-teacher` says."
        )
    if config.needs_worker_groups and config.teacher.service is None and config.teacher.device_mapping:
        mappings.append(config.teacher.device_mapping)
    load_ray()
    Thread(target=_import_ahead, daemon=True).start()
    timeline = config.log_dir / "timeline.json"
    # Ray cut off while it starts leaves processes behind, and puts a handler of its own in the place of ours.
    with stop_requests() as early, ray_session(sum(map(len, mappings)), timeline) as where, stop_requests() as stop:
        stop.signal = early.signal
        tell(f"{where} {describe_devices(mappings)}")
        from limbeck.launch.driver import Cluster

        cluster = Cluster(config, mappings, tell)
        try:
            return cluster.run(stop)
        finally:
            cluster.end()


def _import_ahead() -> None:
    with suppress(Exception):  # what fails here fails again where it is needed
        import_module("limbeck.launch.driver")
