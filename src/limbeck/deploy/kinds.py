"""The kinds of jobs: PyTorchJob and TrainJob of Kubeflow, RayJob of KubeRay. Each is one function of a ``Job``.

The first process of a container is torchrun and not a shell, so that it receives the SIGTERM that ends a pod.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from limbeck.deploy import pod
from limbeck.deploy.job import Job

Manifest = dict[str, Any]


def pytorch_job(job: Job) -> Manifest:
    """A PyTorchJob of the Kubeflow training operator (kubeflow.org/v1).

    The elastic policy makes the operator pass the rendezvous to torchrun: PET_RDZV_BACKEND, PET_RDZV_ENDPOINT, PET_NNODES
    and PET_MAX_RESTARTS. The number of nodes is fixed, because a run continues only with the same rows in each step.
    """
    container = {
        "name": "pytorch",  # the operator finds the container by this name
        "command": ["torchrun", f"--nproc-per-node={job.gpus_per_node}", *job.program],
        "env": pod.torchrun_environment(job),
        "resources": pod.resources(job),
    }
    labels = {"app.kubernetes.io/name": job.name}
    worker = {
        "replicas": job.nodes,
        "restartPolicy": "OnFailure",
        "template": {"metadata": {"labels": labels}, "spec": pod.pod(job, container)},
    }
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata(job),
        "spec": {
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "minReplicas": job.nodes,
                "maxReplicas": job.nodes,
                "maxRestarts": job.max_restarts,
                "rdzvConf": [{"key": "join_timeout", "value": "1800"}],  # a node may take long to be replaced
            },
            "runPolicy": {"backoffLimit": job.max_restarts, "cleanPodPolicy": "None"},  # keeps the logs
            "pytorchReplicaSpecs": {"Worker": worker},
        },
    }


def train_job(job: Job) -> Manifest:
    """A TrainJob of the Kubeflow Trainer (trainer.kubeflow.org/v1alpha1), on a runtime with ``mlPolicy.torch``.

    The trainer sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT. Kubernetes replaces ``$(…)`` in a
    command by such a variable. The rendezvous is c10d, with which the processes of all nodes restart together.
    """
    command = [
        "env",
        f"--chdir={job.mount_path}",  # a TrainJob cannot set the working directory; env is replaced by torchrun
        "torchrun",
        f"--nproc-per-node={job.gpus_per_node}",
        f"--max-restarts={job.max_restarts}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)",
        "--rdzv-conf=join_timeout=1800",
        *job.program,
    ]
    container = {
        "name": "node",
        "securityContext": pod.CONTAINER_SECURITY,
        "volumeMounts": pod.volume_mounts(job),
    }
    pod_patch = {"template": {"spec": {**pod.pod_placement(job), "containers": [container]}}}
    patch = {"name": "node", "template": {"spec": pod_patch}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(job),
        "spec": {
            "runtimeRef": {"name": job.runtime},
            "trainer": {
                "image": job.image,
                "command": command,
                "env": [*pod.torchrun_environment(job), *pod.environment(job)],
                "numNodes": job.nodes,
                "numProcPerNode": job.gpus_per_node,
                "resourcesPerNode": pod.resources(job),
            },
            "runtimePatches": [
                {
                    "manager": "limbeck",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
                }
            ],
        },
    }


def ray_job(job: Job) -> Manifest:
    """A RayJob of KubeRay (ray.io/v1): the head has no GPU and runs the driver, each worker is one node.

    Limbeck itself restarts lost workers. If the driver is lost, KubeRay starts the job again on a new cluster.
    """
    head = {"name": "head", "resources": {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"memory": "16Gi"}}}
    worker = {"name": "worker", "resources": pod.resources(job)}
    anywhere = replace(job, instance_type=None)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(job),
        "spec": {
            "entrypoint": shlex.join(job.program),
            "backoffLimit": job.max_restarts,
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "headGroupSpec": {
                    "rayStartParams": {"num-gpus": "0"},
                    "template": {"spec": pod.pod(anywhere, head)},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "nodes",
                        "replicas": job.nodes,
                        "minReplicas": job.nodes,
                        "maxReplicas": job.nodes,
                        "rayStartParams": {},
                        "template": {"spec": pod.pod(job, worker)},
                    }
                ],
            },
        },
    }


KINDS: dict[str, Callable[[Job], Manifest]] = {"pytorchjob": pytorch_job, "trainjob": train_job, "rayjob": ray_job}


def metadata(job: Job) -> dict[str, Any]:
    """Name, namespace and annotations of an object of the job."""
    found: dict[str, Any] = {"name": job.name}
    if job.namespace is not None:
        found["namespace"] = job.namespace
    if job.annotations:
        found["annotations"] = job.annotations
    return found
