"""The commands of the manifests, run as two pods over gloo, train as one process does; also after one was evicted."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import yaml
from runs import assert_same_weights, metrics, rows

from limbeck import DistillPipeline
from limbeck.config import load_config

from .pods import Pod, free_port, manifest, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.workers]
STEPS = 40


@pytest.fixture
def volume(settings, tmp_path) -> Path:
    """A volume with the configuration ``two.yaml`` of a run on two ranks, and the student ``one`` of a single process."""
    shared = {"max_steps": STEPS, "eval_steps": 0, "save_steps": 0, "student.training_args.num_train_epochs": 100}
    for name, batch, folder in (("one", 8, str(tmp_path / "one")), ("two", 4, "two")):
        values = settings(**rows(batch), **shared, output_dir=folder)
        values.pop("validation")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    DistillPipeline(load_config(tmp_path / "one.yaml").config).run()
    return tmp_path


def test_a_pytorch_job_survives_the_eviction_of_a_pod(volume, capsys):
    """SIGTERM to one pod saves on all ranks; the pod that replaces it and the other one go on from that checkpoint."""
    spec = manifest(volume / "two.yaml", volume, capsys, "--max-restarts", "3")["spec"]
    policy = spec["elasticPolicy"]
    operator = {  # as setPodEnv and the elastic generator of the training operator 1.9
        "PYTHONUNBUFFERED": "1",
        "PET_NPROC_PER_NODE": "auto",
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"localhost:{free_port()}",
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
        "PET_RDZV_CONF": ",".join(f"{one['key']}={one['value']}" for one in policy["rdzvConf"]),
    }
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    container = worker["template"]["spec"]["containers"][0]
    pods = [Pod(container, operator, volume, volume / f"worker-{index}.log") for index in range(worker["replicas"])]
    lines = volume / "two" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (lines.is_file() and lines.read_text().count("\n") > 2):
        assert time.monotonic() < deadline and all(pod.process.poll() is None for pod in pods), pods[0].log
        time.sleep(0.02)
    pods[1].process.send_signal(signal.SIGTERM)
    assert pods[1].process.wait(60) != 0
    saved = [int(path.name.split("-")[1]) for path in (volume / "two").glob("checkpoint-*")]
    assert len(saved) == 1 and 0 < saved[0] < STEPS
    assert wait_for(pods) >= 1
    logs = "".join(pod.log for pod in pods)
    assert f"Stopped by SIGTERM after step {saved[0]}" in logs and "master_addr=127.0.0.1" in logs
    assert len(metrics(volume / "two", "train/loss")) == STEPS
    assert_same_weights(volume / "one" / "student", volume / "two" / "student", tolerance=1e-4)


PRINTS_RANK = """
import os, torch.distributed as dist
dist.init_process_group("gloo")
ranks = [None, None]
dist.all_gather_object(ranks, (int(os.environ["RANK"]), os.getcwd()))
print("ranks", ranks)
dist.destroy_process_group()
"""


def test_the_pods_of_a_train_job_meet_in_one_process_group(settings, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(output_dir="out")))
    trainer = manifest(config, tmp_path, capsys, "--kind", "trainjob")["spec"]["trainer"]
    (tmp_path / "prints_rank.py").write_text(PRINTS_RANK)
    command = trainer["command"]
    trainer["command"] = [*command[: command.index("-m")], "prints_rank.py"]
    port = str(free_port())
    pods = [
        Pod(
            trainer,
            {  # as the torch plugin of the trainer
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(index),
                "PET_MASTER_ADDR": "localhost",
                "PET_MASTER_PORT": port,
            },
            Path("/"),
            tmp_path / f"node-{index}.log",
        )
        for index in range(2)
    ]
    assert wait_for(pods) == 0
    for pod in pods:
        assert f"ranks [(0, '{tmp_path}'), (1, '{tmp_path}')]" in pod.log
