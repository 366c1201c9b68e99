"""What tests of whole runs share: starting one, reading its metrics, comparing its students."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from ranks import run_on_ranks
from safetensors.torch import load_file

from limbeck.strategies.shards import whole_box
from limbeck.train.tensor_files import open_shards

POLICY = {
    "plugins": [str(Path(__file__).with_name("unequal_rewards.py"))],
    "kd_objective": "policy_gradient",
    "distill_loss_weight": 0.6,
    "rollout.temperature": 1.0,
    "rollout.num_generations": 2,
    "rollout.environment": "unequal",
    "rollout.reward_weight": 0.7,
}
"""A policy gradient whose advantages are the teacher's and those of rewards."""


def nested(flat: dict) -> dict:
    """``{"dotted.key": value}`` as nested dictionaries."""
    whole: dict = {}
    for path, value in flat.items():
        *sections, leaf = path.split(".")
        place = whole
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return whole


def comparable(folder: Path, output: Path, student: str = "student", teacher: str = "teacher", **changes) -> dict:
    """A configuration in float32 on the models and ``rows.jsonl`` of ``folder``, whose runs compare layouts."""
    return nested(
        {
            "student_pretrain": str(folder / student),
            "teacher_pretrain": str(folder / teacher),
            "output_dir": str(output),
            "sequence_length": 63,
            "max_steps": 4,
            "save_steps": 2,
            "track_with": "none",
            "student.model_args.dtype": "fp32",
            "student.training_args.learning_rate": 1e-3,
            "student.training_args.adam_epsilon": 1e-4,  # else the rounding of gradients near 0 becomes whole steps
            "student.data_args.file_name": [str(folder / "rows.jsonl")],
            "teacher.model_args.dtype": "fp32",
            **changes,
        }
    )


def train(settings: dict, tmp_path: Path, ranks: int, *overrides: str) -> str:
    """What ``limbeck train`` prints, on ranks that several tests use."""
    return run_on_ranks(ranks, "-m", "limbeck", "train", str(_configuration(settings, tmp_path, ranks)), *overrides)


def launch(settings: dict, tmp_path: Path, ranks: int, *overrides: str) -> str:
    """The same in processes of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    config = str(_configuration(settings, tmp_path, ranks))
    command = [*(launcher if ranks > 1 else [sys.executable]), "-m", "limbeck", "train", config, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _configuration(settings: dict, tmp_path: Path, ranks: int) -> Path:
    config = tmp_path / f"{ranks}.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config


def metrics(folder: Path, key: str) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


def metric_by_step(folder: Path, key: str) -> dict[int, float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in found if key in line}


def rows(per_device: int, accumulation: int = 1) -> dict:
    return {
        "student.training_args.per_device_train_batch_size": per_device,
        "student.training_args.gradient_accumulation_steps": accumulation,
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A saved student's tensors."""
    return load_file(folder / "model.safetensors")


def training_state(checkpoint: Path, kind: str) -> dict[str, torch.Tensor]:
    """The whole tensors of ``masters`` or ``optimizer`` in a checkpoint of any number of ranks."""
    stored = open_shards((checkpoint / "training").glob(f"{kind}*.safetensors"))
    return {name: tensor[whole_box(tensor.shape)] for name, tensor in stored.items()}


def assert_same_weights(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """Both folders hold the same student."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=tolerance)


def forget_after(folder: Path, step: int) -> None:
    """As if the run had been killed right after its checkpoint at ``step``."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    for link in ("student", "best"):
        (folder / link).unlink(missing_ok=True)
