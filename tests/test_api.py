"""``limbeck.distill``."""

import json

import pytest
from tiny import make_model, rows
from transformers import AutoModelForCausalLM

from limbeck import LimbeckError, distill


def test_distill_takes_rows_as_dicts(tmp_path):
    result = distill(
        make_model(tmp_path / "student"),
        make_model(tmp_path / "teacher", hidden=48, seed=1),
        rows(32),
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        learning_rate=1e-3,
        dtype="fp32",
        sequence_length=64,
        per_device_train_batch_size=8,
    )
    assert result.step == 3
    described = json.loads((result.student.parent / "run.json").read_text())["config"]
    assert described["student"]["model_args"]["dtype"] == described["teacher"]["model_args"]["dtype"] == "fp32"
    assert result.metrics["train/train_distill_loss"] > 0
    AutoModelForCausalLM.from_pretrained(result.student)


def test_distill_without_a_teacher_trains_with_cross_entropy(tmp_path):
    result = distill(
        make_model(tmp_path / "student"), None, rows(16), output_dir=str(tmp_path / "out"), max_steps=1, sequence_length=64,
        per_device_train_batch_size=8,
    )  # fmt: skip
    assert "train/train_distill_loss" not in result.metrics


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(LimbeckError, match="max_step "):
        distill(tmp_path, tmp_path, rows(4), max_step=3)
    with pytest.raises(LimbeckError, match="is empty"):
        distill(tmp_path, tmp_path, [])
