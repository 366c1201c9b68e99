"""The parts of a pod that all kinds share: environment, volumes, resources and the security context."""

from __future__ import annotations

from typing import Any

from limbeck.deploy.job import CONFIG_FOLDER, Job

SECRET_KEYS = ("HF_TOKEN", "WANDB_API_KEY")
"""Keys of the Secret that become environment variables, if it has them."""


def environment(job: Job) -> list[dict[str, Any]]:
    """Environment variables of a container."""
    values = {
        "HF_HOME": f"{job.mount_path}/.cache/huggingface",  # a container that starts again has an empty file system
        "NCCL_SOCKET_IFNAME": "^lo",
    }
    if job.efa_per_node:
        values |= {"FI_PROVIDER": job.fi_provider, "FI_EFA_USE_HUGE_PAGE": "0"}  # huge pages break processes that fork
    secrets = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": job.secret, "key": key, "optional": True}}}
        for key in SECRET_KEYS
    ]
    return [*_literal(values), *secrets]


def torchrun_environment(job: Job) -> list[dict[str, Any]]:
    """Environment variables for torchrun, whose flags may be given as ``PET_…``."""
    values = {
        "LOGLEVEL": "INFO",  # reports the address of the main process
        "PET_SHUTDOWN_TIMEOUT": str(job.grace_period - 10),  # it kills its processes 30 s after SIGTERM otherwise
        # With one store for all attempts, a restart may connect to addresses of the attempt before.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    # The other pods reach this one by its address, whatever names the cluster's DNS has.
    address = {"name": "PET_LOCAL_ADDR", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    return [*_literal(values), address]


def _literal(values: dict[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def resources(job: Job) -> dict[str, Any]:
    """The devices of a pod. Kubernetes wants the same number requested and allowed."""
    devices = {"nvidia.com/gpu": job.gpus_per_node}
    if job.efa_per_node:
        devices["vpc.amazonaws.com/efa"] = job.efa_per_node
    return {"requests": devices, "limits": devices}


def volumes(job: Job) -> list[dict[str, Any]]:
    """The volumes of a pod. NCCL and data loaders exchange tensors through /dev/shm, whose default is 64 MiB."""
    memory: dict[str, Any] = {"medium": "Memory"}
    if job.shm_size is not None:
        memory["sizeLimit"] = job.shm_size
    found: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": memory},
        {"name": "storage", "persistentVolumeClaim": {"claimName": job.pvc}},
    ]
    if job.config is not None:
        found.append({"name": "configuration", "configMap": {"name": job.name}})
    return found


def volume_mounts(job: Job) -> list[dict[str, Any]]:
    """Where ``volumes`` are mounted."""
    found: list[dict[str, Any]] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "storage", "mountPath": job.mount_path},
    ]
    if job.config is not None:
        found.append({"name": "configuration", "mountPath": CONFIG_FOLDER, "readOnly": True})
    return found


def node_selector(job: Job) -> dict[str, str]:
    """Labels that a node must have."""
    by_type = {} if job.instance_type is None else {"node.kubernetes.io/instance-type": job.instance_type}
    return {**by_type, **job.node_selector}


def pod_security(job: Job) -> dict[str, Any]:
    """Runs as a user without privileges, who may write the volume."""
    return {
        "runAsNonRoot": True,
        "runAsUser": job.user,
        "runAsGroup": job.user,
        "fsGroup": job.user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod_placement(job: Job) -> dict[str, Any]:
    """What a pod has besides its containers and the restart policy, also as the patch of a TrainJob's runtime."""
    found: dict[str, Any] = {
        "securityContext": pod_security(job),
        "terminationGracePeriodSeconds": job.grace_period,
        "volumes": volumes(job),
    }
    if selector := node_selector(job):
        found["nodeSelector"] = selector
    return found


def pod(job: Job, container: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A pod with one container, to which image, environment, volumes and security context are added."""
    own = container.get("env", [])
    whole = {
        "name": container["name"],
        "image": job.image,
        "workingDir": job.mount_path,
        **container,
        "env": [*own, *environment(job)],
        "volumeMounts": volume_mounts(job),
        "securityContext": CONTAINER_SECURITY,
    }
    return {"automountServiceAccountToken": False, **settings, **pod_placement(job), "containers": [whole]}
