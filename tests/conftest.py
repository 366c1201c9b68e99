"""Every test is offline, seeded and alone in its cache."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from runs import nested
from tiny import make_data, make_model

from limbeck import DistillPipeline, registry
from limbeck.config import DistillConfig, load_mapping


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "token-cache"))
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _only_built_in_extensions(monkeypatch):
    """Forget what plug-in files have registered, and run them again in the next test."""
    for found in vars(registry).values():
        if isinstance(found, registry.Registry):
            monkeypatch.setattr(found, "_registered", dict(found._registered))
            monkeypatch.setattr(found, "_traits", dict(found._traits))
    yield
    for name in [name for name in sys.modules if name.startswith("limbeck_plugin_")]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_model(folder / "teacher", hidden=48, layers=3, seed=1)
    make_model(folder / "student")
    make_data(folder / "rows.jsonl")
    return folder


def twelve_steps(assets: Path, output: Path, **changes) -> dict:
    """Nested dictionaries of a 12-step float32 run."""
    flat = {
        "student_pretrain": str(assets / "student"),
        "teacher_pretrain": str(assets / "teacher"),
        "output_dir": str(output),
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


@pytest.fixture
def settings(assets, tmp_path):
    """``settings(**{"dotted.key": value})`` → nested dictionaries of a 12-step float32 run."""
    return partial(twelve_steps, assets, tmp_path / "out")


@pytest.fixture(scope="session")
def alone(assets, tmp_path_factory):
    """``alone(**{"dotted.key": value})`` → folder of such a run by one process, which tests share and only read."""
    made: dict[str, Path] = {}

    def run(**changes) -> Path:
        name = repr(sorted(changes.items()))
        if name not in made:
            folder = tmp_path_factory.mktemp("alone")
            torch.manual_seed(0)
            DistillPipeline(load_mapping(twelve_steps(assets, folder, **changes)).config).run()
            made[name] = folder
        return made[name]

    return run


@pytest.fixture
def configure(settings):
    """The same as a checked configuration."""

    def build(**changes) -> DistillConfig:
        return load_mapping(settings(**changes)).config

    return build
