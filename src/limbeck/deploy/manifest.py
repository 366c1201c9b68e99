"""Turns the arguments of ``limbeck deploy kubernetes`` into a manifest. Nothing is written before everything is checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from limbeck.config import DistillConfig, load_config
from limbeck.config.compose import find_file
from limbeck.config.yaml_values import load_yaml
from limbeck.deploy.job import CONFIG_FOLDER, Job
from limbeck.deploy.kinds import KINDS, Manifest, metadata
from limbeck.errors import LimbeckError

_CONFIG_KEY = "config.yaml"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)


def make_manifest(
    kind: str, job: Job, config_file: Path, overrides: Sequence[str] = (), dialect: str | None = None
) -> tuple[str, list[str]]:
    """The manifest of a job that trains the configuration, and the notices of the configuration.

    The file becomes a ConfigMap; overrides stay arguments of the command. A restarted run resumes from its newest checkpoint.

    Args:
        kind: a name in ``KINDS``.
        job: as ``job_from_flags`` makes it; ``program`` and ``config`` are replaced.
        config_file: one YAML file without ``defaults``.

    Raises:
        LimbeckError: for the first mistake in the arguments, or all those in the configuration.
    """
    if kind not in KINDS:
        raise LimbeckError(f"--kind {kind} is not a kind of job; use one of {', '.join(KINDS)}.")
    file = find_file(config_file)
    loaded = load_config(file, overrides, dialect)
    _check_resume(loaded.config)
    overrides = [*overrides, "resume_from_checkpoint=latest"]
    if kind == "rayjob":
        overrides += [f"num_nodes={job.nodes}", f"num_gpus_per_node={job.gpus_per_node}"]
        if loaded.config.device_mapping is None:
            overrides.append(f"student.device_mapping={','.join(map(str, range(_processes(job))))}")
        loaded = load_config(file, overrides, dialect)
    _check_launch(kind, job, loaded.config)
    _check_folders(job, loaded.config)
    text = _read(file)
    _check_secrets(loaded.config)
    options = [] if dialect is None else ["--dialect", dialect]
    arguments = ("limbeck", "train", f"{CONFIG_FOLDER}/{_CONFIG_KEY}", *options, *overrides)
    job = replace(job, config=text, program=arguments if kind == "rayjob" else ("-m", *arguments))
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(replace(job, annotations={})),
        "data": {_CONFIG_KEY: text},
    }
    return render([config_map, KINDS[kind](job)]), loaded.notices


def render(objects: Sequence[Manifest]) -> str:
    """Objects as one YAML stream."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, and repeated parts in full instead of as aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _processes(job: Job) -> int:
    return int(job.nodes) * int(job.gpus_per_node)


def _read(config_file: Path) -> str:
    """The text of the configuration, if it is complete without other files."""
    text = config_file.read_text(encoding="utf-8")
    if re.search(r"^defaults\s*:", text, re.MULTILINE):
        raise LimbeckError(
            f"{config_file} has defaults from other files, which are not in the manifest; write one file with `limbeck config "
            f"{config_file} > whole.yaml`, and use that."
        )
    for key, value in _leaves(load_yaml(text)):
        if key in ("layers_to_unfreeze", "unfrozen_parameters") and isinstance(value, str):
            raise LimbeckError(
                f"{config_file} names the file {value} in {key}, which is not in the manifest; write the list of that file "
                "there instead."
            )
    return text


def _leaves(section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The last part of each key, and its value."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield key.rpartition(".")[2], value


def _check_resume(config: DistillConfig) -> None:
    resume = config.resume_from_checkpoint
    if isinstance(resume, str) and resume != "latest":
        raise LimbeckError(
            f"resume_from_checkpoint = {resume} would be used again after every restart, which must resume from the newest "
            "checkpoint; remove it."
        )


def _check_launch(kind: str, job: Job, config: DistillConfig) -> None:
    if kind == "rayjob":
        if not config.needs_worker_groups and config.num_nodes == 1:
            raise LimbeckError(
                "--kind rayjob with one node and no devices for the teacher alone needs no Ray; use --kind pytorchjob, or "
                "give teacher.device_mapping devices that the student does not have."
            )
        return
    if config.needs_worker_groups:
        raise LimbeckError(
            f"--kind {kind} starts all processes alike, but the teacher is a service or has its own devices; use --kind rayjob."
        )
    if config.device_mapping and len(config.device_mapping) != _processes(job):
        raise LimbeckError(
            f"student.device_mapping names {len(config.device_mapping)} devices, but the job has --nodes {job.nodes} x "
            f"--gpus-per-node {job.gpus_per_node} = {_processes(job)}; remove device_mapping, or change the flags."
        )


def _check_folders(job: Job, config: DistillConfig) -> None:
    for key, folder in (("output_dir", config.output_dir), ("checkpoint_config.output_dir", config.checkpoint_dir)):
        path = PurePosixPath(job.mount_path, folder)
        if not path.is_relative_to(job.mount_path) or ".." in path.parts:
            raise LimbeckError(
                f"{key} = {folder} is not on the volume, so that the checkpoints would be lost with the pods; use a folder in "
                f"{job.mount_path}, or a relative one."
            )


def _check_secrets(config: DistillConfig) -> None:
    settings = {
        **{f"system_envs.{name}": value for name, value in config.system_envs.items()},
        **{f"student.system_envs.{name}": value for name, value in config.student.system_envs.items()},
        **{f"teacher.system_envs.{name}": value for name, value in config.teacher.system_envs.items()},
        **{
            f"tracker_kwargs of {tracker}: {name}": value
            for tracker, kwargs in config.trackers.items()
            for name, value in kwargs.items()
        },
    }
    for key, value in settings.items():
        if value and _SECRET_NAME.search(re.split(r"[. ]", key)[-1]):
            raise LimbeckError(
                f"{key} may be a secret, and would be readable in the manifest; remove it from the configuration, and put "
                "HF_TOKEN or WANDB_API_KEY into the Secret that --secret names."
            )
