"""``accelerate launch``: the settings that it passes in the environment, and a check of the number of processes.

Limbeck runs its own strategies in the processes that accelerate starts; the package accelerate itself is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from limbeck.config import LauncherSetting
from limbeck.config.dialects.files import read_mapping
from limbeck.config.launcher import launched_processes
from limbeck.errors import LimbeckError

_COMMAND = "accelerate launch"
_ZERO = "student.strategy_args.strategy_config"


def launcher_settings(environment: Mapping[str, str]) -> list[LauncherSetting]:
    """The settings of ``accelerate launch`` as Limbeck's keys; empty if something else started this process.

    Raises:
        LimbeckError: for parallelism that is configured here with other keys, or a DeepSpeed file that cannot be read.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return []
    for variable, flag in (("MEGATRON_LM", "--use_megatron_lm"), ("PARALLELISM_CONFIG", "--use_parallelism_config")):
        if environment.get(f"ACCELERATE_USE_{variable}") == "true":
            raise LimbeckError(
                f"{_COMMAND} {flag} is not read by Limbeck; remove it, and set student.strategy_args.strategy_config."
            )
    settings = []
    precision = environment["ACCELERATE_MIXED_PRECISION"]
    if precision == "fp8":
        raise LimbeckError(f"{_COMMAND} --mixed_precision fp8 is not supported; use bf16, fp16 or no.")
    if precision in ("bf16", "fp16"):
        flag = f"{_COMMAND} --mixed_precision"
        settings += [LauncherSetting(f"{role}.model_args.dtype", precision, flag) for role in ("student", "teacher")]
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        settings += _deepspeed(environment)
    return settings


def _deepspeed(environment: Mapping[str, str]) -> Iterator[LauncherSetting]:
    yield LauncherSetting("student.strategy_args.strategy_name", "deepspeed_train", f"{_COMMAND} --use_deepspeed")
    if file := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        flag = f"{_COMMAND} --deepspeed_config_file"
        for key, value in read_mapping(Path(file), flag, {}).items():
            yield LauncherSetting(f"{_ZERO}.{key}", value, flag)
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    key = f"{_ZERO}.zero_optimization.stage"
    yield LauncherSetting(key, int(stage or 2), f"{_COMMAND} --zero_stage", is_default=stage is None)
    for what in ("optimizer", "param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        if device != "none":
            key, offload = f"{_ZERO}.zero_optimization.offload_{what}", {"device": device}
            if path := environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_NVME_PATH"):
                offload["nvme_path"] = path
            yield LauncherSetting(key, offload, f"{_COMMAND} --offload_{what}_device")
    for variable, kind, key in (
        ("GRADIENT_ACCUMULATION_STEPS", int, "student.training_args.gradient_accumulation_steps"),
        ("GRADIENT_CLIPPING", float, "max_grad_norm"),
    ):
        if value := environment.get(f"ACCELERATE_{variable}"):
            yield LauncherSetting(key, kind(value), f"{_COMMAND} --{variable.lower()}")


def check_world_size(environment: Mapping[str, str]) -> None:
    """Raise LimbeckError if ``accelerate launch`` has started another number of processes than requested.

    It starts a single one with --cpu, and on several machines with its default DeepSpeed launcher it starts those of one
    machine, which would each train a student of their own.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return
    started = launched_processes(environment) or 1
    requested: int | str | None = next(
        (n for argv in _ancestors() if (n := requested_processes(argv)) is not None), None
    )
    if requested is None and started == 1 and "WORLD_SIZE" not in environment and "MASTER_ADDR" in environment:
        requested = "several"  # it sets the address only if there is more than one process
    if requested not in (None, started):
        raise LimbeckError(
            f"{_COMMAND} was to start {requested} processes, but this run has {started}; on several machines add "
            "--deepspeed_multinode_launcher standard and give each machine its --machine_rank, and without GPUs use torchrun "
            "or --use_deepspeed instead of --cpu."
        )


def requested_processes(argv: Sequence[str]) -> int | None:
    """The ``--num_processes`` of a command line, or of its configuration file; None if it is no such command."""
    names = [Path(word).name for word in argv]
    start = next((i for i, name in enumerate(names) if name.startswith("accelerate")), None)
    if start is None or (names[start] == "accelerate" and "launch" not in names[start:]):
        return None
    own = []
    for word in argv[start + 1 :]:
        if word.endswith(".py") or Path(word).name == "limbeck":  # what follows are flags of the script
            break
        own.extend(word.split("=", 1))
    given = {
        word[2:].replace("-", "_"): value for word, value in zip(own, [*own[1:], ""], strict=True) if word[:2] == "--"
    }
    if "num_processes" not in given and "config_file" in given:
        given = read_mapping(Path(given["config_file"]), f"{_COMMAND} --config_file", {})
    elif "num_processes" not in given and (default := _default_config()) is not None:
        given = read_mapping(default, "the configuration of `accelerate config`", {})
    try:
        return int(given["num_processes"])
    except (KeyError, ValueError):
        return None


def _default_config() -> Path | None:
    """The file that ``accelerate config`` has written, which ``accelerate launch`` reads without ``--config_file``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    folder = Path(os.environ.get("HF_HOME", cache)).expanduser() / "accelerate"
    return next(
        (file for file in (folder / f"default_config.{end}" for end in ("yaml", "json")) if file.is_file()), None
    )


def _ancestors() -> Iterator[list[str]]:
    """The command lines of the processes around this one, nearest first; none where there is no /proc."""
    pid = os.getppid()
    while pid:  # in a container the launcher may be process 1
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return
        yield argv
