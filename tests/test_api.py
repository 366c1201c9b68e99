"""``limbeck.distill``: one call from Python, with the same checks as a file."""

import json

import pytest
from tiny import make_model, rows
from transformers import AutoModelForCausalLM

from limbeck import LimbeckError, distill


def test_one_call_distils_rows_in_memory(tmp_path):
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


def test_without_a_teacher_it_trains_on_the_answers(tmp_path):
    result = distill(
        make_model(tmp_path / "student"), None, rows(16), output_dir=str(tmp_path / "out"), max_steps=1, sequence_length=64,
        per_device_train_batch_size=8,
    )  # fmt: skip
    assert "train/train_distill_loss" not in result.metrics


def test_mistakes_are_told_by_name(tmp_path):
    with pytest.raises(LimbeckError, match="max_step "):
        distill(tmp_path, tmp_path, rows(4), max_step=3)
    with pytest.raises(LimbeckError, match="is empty"):
        distill(tmp_path, tmp_path, [])
