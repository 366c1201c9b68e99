"""A tiny teacher, a tiny student and a file, and the configuration of a short run over them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_data, make_model

from limbeck.config import DistillConfig, load_mapping


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_model(folder / "teacher", hidden=48, layers=3, seed=1)
    make_model(folder / "student")
    make_data(folder / "rows.jsonl")
    return folder


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


@pytest.fixture
def settings(assets, tmp_path):
    """``settings(**{"dotted.key": value})`` → nested dictionaries of a 12-step float32 run."""

    def build(**changes) -> dict:
        flat = {
            "student_pretrain": str(assets / "student"),
            "teacher_pretrain": str(assets / "teacher"),
            "output_dir": str(tmp_path / "out"),
            "sequence_length": 64,
            "max_steps": 12,
            "save_steps": 5,
            "eval_steps": 4,
            "logging_steps": 1,
            "track_with": "none",
            "student.model_args.dtype": "fp32",
            "student.model_args.disable_gradient_checkpointing": True,
            "student.training_args.learning_rate": 1e-3,
            "student.training_args.per_device_train_batch_size": 8,
            "student.data_args.file_name": [str(assets / "rows.jsonl")],
            "teacher.model_args.dtype": "fp32",
            "validation.data_args.file_name": [str(assets / "rows.jsonl")],
            **changes,
        }
        return nested(flat)

    return build


@pytest.fixture
def configure(settings):
    """The same as a checked configuration."""

    def build(**changes) -> DistillConfig:
        return load_mapping(settings(**changes)).config

    return build


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A saved student's tensors."""
    return load_file(folder / "model.safetensors")


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
