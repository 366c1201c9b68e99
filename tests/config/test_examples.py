from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from limbeck.config import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launcher", EXAMPLES / "start_distill_pipeline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/distill*.yaml")), ids=lambda path: path.parent.name)
def test_every_example_loads_without_a_notice(path: Path) -> None:
    assert load_config(path).notices == []


def test_a_configuration_beside_the_examples_finds_their_deepspeed_presets(tmp_path: Path) -> None:
    (tmp_path / "config").symlink_to(EXAMPLES / "config")
    (tmp_path / "mine").mkdir()
    names = ["zero", "zero2", "zero3", "zero3_cpuoffload"]
    (tmp_path / "mine" / "run.yaml").write_text(
        "defaults:\n"
        + "".join(f"  - ../config/deepspeed_{name}@_here_\n" for name in names)
        + "student_pretrain: s\nteacher_pretrain: t\n"
        "student:\n  data_args: {file_name: d}\n"
        "  strategy_args: {strategy_name: deepspeed_train, strategy_config: '${deepspeed_zero3}'}\n"
    )
    block = load_config(tmp_path / "mine" / "run.yaml").config.student.strategy_args.strategy_config.deepspeed
    assert block == {"zero_optimization": {"stage": 3}}
    override = ["student.strategy_args.strategy_config=${deepspeed_zero3_cpuoffload}"]
    block = load_config(tmp_path / "mine" / "run.yaml", override).config.student.strategy_args.strategy_config.deepspeed
    assert block["zero_optimization"]["offload_param"] == {"device": "cpu"}


@pytest.mark.parametrize("spelling", ["tiny", "examples/tiny", str(EXAMPLES / "tiny")])
def test_the_launcher_finds_a_folder_from_anywhere(
    launcher: ModuleType, spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (EXAMPLES.parent, EXAMPLES, tmp_path):
        monkeypatch.chdir(folder)
        assert launcher.find_folder(spelling).resolve() == EXAMPLES / "tiny"


def test_the_launcher_hands_its_arguments_to_the_one_entry(
    launcher: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(launcher, "train_from_config", lambda path, overrides: seen.append((path, overrides)) or 0)
    monkeypatch.chdir(EXAMPLES)
    arguments = ["--config_path", "tiny", "--config_name", "distill", "max_steps=3", "~seed"]
    monkeypatch.setattr(sys, "argv", ["start_distill_pipeline.py", *arguments])
    assert launcher.main() == 0
    assert seen == [(Path("tiny/distill.yaml"), ["max_steps=3", "~seed"])]


@pytest.mark.processes
def test_the_shell_wrapper_passes_overrides_through(tmp_path: Path) -> None:
    script = EXAMPLES / "qwen2.5-7B-distill_fsdp2" / "run_distill_pipeline.sh"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(script), "sead=1"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "command line: sead is not a key; did you mean seed?" in done.stderr
