"""The script with the flags of HyperPod's sample, run as a user runs it."""

import importlib.util
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from limbeck.errors import USER_MISTAKE

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "distil_logits_cli.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """``script(*argv)`` returns the exit status; the working folder is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    spec = importlib.util.spec_from_file_location("distil_logits_cli", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv])
        return module.main()

    return run


@pytest.mark.parametrize(
    ("files", "argv", "sentence"),
    [
        ({}, "--num_sample 3", "--num_sample is not a flag, did you mean --num_samples?"),
        ({}, "--bf16 --fp16", "--fp16 and --bf16 contradict each other; keep one"),
        ({"c.yaml": "training: {bf16: true, fp16: true}"}, "--config_file c.yaml", "contradict each other"),
        ({}, "--config_file nowhere.yaml", "--config_file nowhere.yaml cannot be read"),
        ({}, "--config_file .", "must end in .json, .yaml or .yml"),
        ({"c.json": "{"}, "--config_file c.json", "c.json is not JSON"),
        ({"c.yaml": "a: ["}, "--config_file c.yaml", "c.yaml is not YAML"),
        ({"c.yaml": "models: {techer: x}"}, "--config_file c.yaml", "did you mean models.teacher?"),
        ({}, "--hub_location me/student", "needs a token; set HF_TOKEN, or run `hf auth login` once"),
        (
            {"s.yaml": "unfrozen_parameters: []"},
            "--layers_to_unfreeze s.yaml",
            "is empty, which freezes everything; name parameters",
        ),
        ({"s.yaml": "layers: [a]"}, "--layers_to_unfreeze s.yaml", "s.yaml has no list unfrozen_parameters"),
        ({"s.yaml": "unfrozen_parameters: [l.9]"}, "--layers_to_unfreeze s.yaml", "no parameter matches 'l.9'"),
        ({}, "--dataset_name nowhere.jsonl", "nowhere.jsonl"),
        ({}, "--student_model ./nowhere", "./nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(script, assets, monkeypatch, capsys, files, argv, sentence):
    for name, text in files.items():
        Path(name).write_text(text)
    for name in ("HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no-token")
    if "hub" in argv:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    models = ["--teacher_model", str(assets / "teacher"), "--student_model", str(assets / "student")]
    data = ["--dataset_name", str(assets / "rows.jsonl"), "--max_length", "192", "track_with=none"]
    assert script(*models, *data, *argv.split()) == USER_MISTAKE
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("limbeck: ") and lines[0].endswith((".", "?")), lines
    assert sentence in lines[0]
    assert {path.name for path in Path().iterdir()} == files.keys()
