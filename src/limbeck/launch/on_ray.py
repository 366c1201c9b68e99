"""Starts a run on Ray. Light to import: PyTorch is imported while Ray starts, which is mostly waiting."""

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
from limbeck.interrupt import ENDS, stop_requests

if TYPE_CHECKING:
    from limbeck.train.result import RunResult


def run_on_ray(config: DistillConfig, log: Callable[[str], None] = print) -> RunResult:
    """Train on groups of Ray workers to the end, or until SIGINT or SIGTERM. ``log`` receives the lines for the
    console.

    Raises LimbeckError for a user's mistake and after ``max_restarts`` lost workers; Stopped if a signal arrives before
    there is anything to save.
    """
    mappings = [config.student.device_mapping or [0]]
    if config.teacher.service is not None and not can_join():
        raise LimbeckError(
            f"teacher.service = {config.teacher.service} is on a Ray that this run must join; set RAY_ADDRESS to what "
            "`limbeck serve-teacher` prints."
        )
    if config.needs_worker_groups and config.teacher.service is None and config.teacher.device_mapping:
        mappings.append(config.teacher.device_mapping)
    own = (config.rollout and config.rollout.device_mapping) or []
    load_ray()
    Thread(target=_import_ahead, daemon=True).start()
    timeline = config.log_dir / "timeline.json"
    # Interrupted while it starts, Ray leaves processes behind; it also replaces our signal handler.
    with (
        stop_requests(ENDS) as early,
        ray_session(sum(map(len, mappings)) + len(own), timeline) as where,
        stop_requests(ENDS) as stop,
    ):
        stop.signal = early.signal
        log(f"{where} {describe_devices([*mappings, own] if own else mappings)}")
        from limbeck.launch.driver import Driver

        driver = Driver(config, mappings, log)
        try:
            return driver.run(stop)
        finally:
            driver.end()


def _import_ahead() -> None:
    with suppress(Exception):  # an import that fails here fails again where it is needed
        import_module("limbeck.launch.driver")
