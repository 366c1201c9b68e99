"""Starts the processes of a run: this one, one per device on this machine, or workers on Ray. Light to import."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from limbeck.config import DistillConfig, LoadedConfig, load_arguments, load_config
from limbeck.config.launcher import launched_processes
from limbeck.errors import USER_MISTAKE, LimbeckError
from limbeck.launch.accelerate import check_world_size, launcher_settings
from limbeck.launch.local_ranks import STARTED_HERE, run_ranks, visible_devices
from limbeck.train.run_lock import lock_run


def train_from_config(config_file: Path, overrides: Sequence[str], dialect: str | None = None) -> int:
    """Run the distillation that a YAML file describes.

    A ``device_mapping`` of several devices starts that many processes on this machine, unless torchrun has started them.

    Returns:
        The exit status.
    """
    loaded = load_config(config_file, overrides, dialect, launcher_settings(os.environ))
    options = [] if dialect is None else ["--dialect", dialect]
    return _train(loaded, [sys.executable, "-m", "limbeck", "train", str(config_file), *options, *overrides])


def train_from_arguments(script: str, argv: Sequence[str], dialect: str) -> int:
    """The program of a script with the arguments of another system, which runs the distillation that they describe.

    Args:
        script: the program that received ``argv``; each process of a ``device_mapping`` runs it again.
        dialect: of the arguments.

    Returns:
        The exit status. A mistake of the user is printed.
    """
    try:
        loaded = load_arguments(argv, dialect, launcher=launcher_settings(os.environ))
        return _train(loaded, [sys.executable, script, *argv])
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        return USER_MISTAKE


def _train(loaded: LoadedConfig, command: Sequence[str]) -> int:
    try:
        return _start(loaded, command)
    except LimbeckError as error:
        error.args = (loaded.with_origin(str(error)), *error.args[1:])
        raise


def _start(loaded: LoadedConfig, command: Sequence[str]) -> int:
    if not os.environ.get(STARTED_HERE):  # a device_mapping starts more processes than the launcher
        check_world_size(os.environ)
    config = loaded.config
    os.environ.update(config.environment)  # before torch is imported, which reads some of them only once
    devices = config.device_mapping or []
    launched = launched_processes()
    if launched and devices and launched != len(devices):
        raise LimbeckError(
            f"student.device_mapping names {len(devices)} devices, but the launcher started {launched} "
            f"processes; start {len(devices)} processes, or remove device_mapping."
        )
    if config.needs_worker_groups and launched:
        raise LimbeckError(
            "the teacher is a service or has its own devices, so Ray must start the processes; run `limbeck train` without a "
            "launcher."
        )
    if int(os.environ.get("RANK", "0")) > 0:
        return _train_here(loaded)
    with lock_run(config):  # before anything slow is imported or started
        if config.needs_worker_groups or (config.num_nodes > 1 and not launched):
            for notice in loaded.notices:
                print(f"note: {notice}", file=sys.stderr)
            return _train_on_ray(config)
        if len(devices) > 1 and not launched:
            return run_ranks(len(devices), command)
        return _train_here(loaded)


def _train_here(loaded: LoadedConfig) -> int:
    """Train as one rank, in this process."""
    config = loaded.config
    devices = config.device_mapping or []
    if devices and config.num_nodes == 1:  # on several machines each process uses the GPU of its local rank
        own = (config.rollout and config.rollout.device_mapping) or []  # of the generator, after those of the ranks
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices([*devices, *own], allowed)

    from limbeck.plan.adapt import adapt
    from limbeck.train.loop import DistillPipeline

    result = DistillPipeline(config, adapt, loaded.notices, loaded.with_origin).run()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"student: {result.student}")
    return 128 + result.stopped_by if result.stopped_by else 0


def _train_on_ray(config: DistillConfig) -> int:
    from limbeck.launch.on_ray import run_on_ray

    result = run_on_ray(config, lambda line: print(line, flush=True))
    print(f"student: {result.student}")
    return 128 + result.stopped_by if result.stopped_by else 0
