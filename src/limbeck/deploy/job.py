"""The settings of a job on a cluster, and their checks. Nothing here depends on the kind of the manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from limbeck.errors import LimbeckError

CONFIG_FOLDER = "/etc/limbeck"
"""Where the containers find the configuration."""

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")
_OBJECT_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_QUANTITY = re.compile(r"[1-9][0-9]*([KMGT]i?)?")
_KEY = re.compile(r"([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training job. Numbers may be ``${VARIABLE}`` in the template for ``envsubst``.

    Attributes:
        image: with registry and tag.
        pvc: the PersistentVolumeClaim of a volume that all nodes can write. It holds models, data and checkpoints.
        program: what each process runs, as the arguments of ``torchrun`` or, on Ray, a whole command.
        config: text of the configuration, which becomes a ConfigMap; None if ``program`` needs none.
        nodes, gpus_per_node, efa_per_node: machines, and the GPUs and EFA adapters of each. Without EFA, 0.
        name: of the job.
        namespace: of all objects; None for that of ``kubectl``.
        mount_path: where the volume is mounted. It is also the working directory.
        instance_type: of the nodes, such as ml.p5en.48xlarge; None for any.
        node_selector, annotations: labels that the nodes must have, and annotations of the job.
        secret: the Secret with the keys HF_TOKEN and WANDB_API_KEY, both optional.
        shm_size: maximum size of /dev/shm; None for half of the node's memory.
        max_restarts: number of times that the processes, and that failed containers, are started again.
        grace_period: seconds in which a pod that must end may complete its step and save.
        runtime: the ClusterTrainingRuntime of a TrainJob.
        fi_provider: the libfabric provider of NCCL.
        user: id of the user and the group that the containers run as.
    """

    image: str
    pvc: str
    program: tuple[str, ...]
    config: str | None = None
    nodes: int | str = 1
    gpus_per_node: int | str = 8
    efa_per_node: int | str = 0
    name: str = "distill"
    namespace: str | None = None
    mount_path: str = "/fsx"
    instance_type: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    secret: str = "hf-token"
    shm_size: str | None = None
    max_restarts: int = 10
    grace_period: int = 600
    runtime: str = "torch-distributed"
    fi_provider: str = "efa"
    user: int = 1000


_NUMBERS = ("nodes", "gpus_per_node", "efa_per_node", "max_restarts", "grace_period", "user")
_TEXTS = ("name", "namespace", "mount_path", "instance_type", "secret", "shm_size", "runtime")
_REQUIRED = {
    "image": "the name of an image in a registry, such as --image REGISTRY/distill:TAG",
    "pvc": "the PersistentVolumeClaim of a volume that all nodes can write, such as --pvc fsx-claim",
}


def job_from_flags(flags: Mapping[str, Any]) -> Job:
    """The job of command-line flags, without its program; a flag that is None has the default of ``Job``.

    Raises:
        LimbeckError: if a required flag is missing, or a value cannot be read or used.
    """
    for name, meaning in _REQUIRED.items():
        if flags[name] is None:
            raise LimbeckError(f"--{name} is missing; give {meaning}.")
    given: dict[str, Any] = {name: flags[name] for name in (*_TEXTS, *_REQUIRED) if flags[name] is not None}
    for name in _NUMBERS:
        if flags[name] is not None:
            try:
                given[name] = int(flags[name])
            except ValueError:
                raise LimbeckError(
                    f"--{name.replace('_', '-')} {flags[name]} is not a number; give a whole number."
                ) from None
    given["node_selector"] = _pairs("--node-selector", flags["node_selector"])
    given["annotations"] = _pairs("--annotation", flags["annotation"])
    job = Job(program=(), **given)
    check_job(job)
    return job


def _pairs(flag: str, words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise LimbeckError(f"{flag} {word} is not a pair; write {flag} KEY=VALUE.")
        found[key] = value
    return found


def check_job(job: Job) -> None:
    """Raise LimbeckError, which names the flag, for settings that a cluster would refuse or that cannot work."""
    for flag, value, smallest in (
        ("--nodes", job.nodes, 1),
        ("--gpus-per-node", job.gpus_per_node, 1),
        ("--efa-per-node", job.efa_per_node, 0),
        ("--max-restarts", job.max_restarts, 0),
        ("--grace-period", job.grace_period, 30),
        ("--user", job.user, 1),
    ):
        if isinstance(value, int) and value < smallest:
            raise LimbeckError(f"{flag} {value} is too small; give a number of at least {smallest}.")
    if not job.image or re.search(r"\s", job.image):
        raise LimbeckError(
            f"--image {job.image!r} is not the name of an image; give one, such as REGISTRY/distill:TAG."
        )
    for flag, name in (("--name", job.name), ("--namespace", job.namespace)):
        if name is not None and not _NAME.fullmatch(name):
            raise LimbeckError(
                f"{flag} {name} is not a name that Kubernetes accepts; use at most 52 lower-case letters, digits and -, "
                "beginning with a letter."
            )
    for key in (*job.node_selector, *job.annotations):
        if not _KEY.fullmatch(key):
            raise LimbeckError(
                f"{key!r} is not a key of a label or an annotation that Kubernetes accepts; use letters, digits, -, _ and '.', "
                "after a domain and / if it has one."
            )
    for flag, name in (
        ("--pvc", job.pvc),
        ("--secret", job.secret),
        ("--runtime", job.runtime),
    ):
        if name is not None and not _OBJECT_NAME.fullmatch(name):
            raise LimbeckError(
                f"{flag} {name!r} is not a name that Kubernetes accepts; use lower-case letters, digits, - and '.'."
            )
    path = PurePosixPath(job.mount_path)
    if not path.is_absolute() or str(path) == "/" or ".." in path.parts:
        raise LimbeckError(f"--mount-path {job.mount_path} is not an absolute path of a folder; use one such as /fsx.")
    if job.shm_size is not None and not _QUANTITY.fullmatch(job.shm_size):
        raise LimbeckError(f"--shm-size {job.shm_size} is not a size; use a number with a unit, such as 64Gi.")
    labels = {
        **job.node_selector,
        **({"node.kubernetes.io/instance-type": job.instance_type} if job.instance_type else {}),
    }
    for key, value in labels.items():
        if value and not _LABEL.fullmatch(value):
            raise LimbeckError(
                f"the label {key}={value} of the nodes is not one that Kubernetes accepts; use at most 63 letters, digits, "
                "-, _ and '.'."
            )
