"""Runs with a user-defined divergence, with the schedule of TAID, and with top-k."""

import shutil
from pathlib import Path

import pytest
from runs import assert_same_weights, forget_after

from limbeck.errors import LimbeckError
from limbeck.train.loop import DistillPipeline

OWN = """
from limbeck.objectives import register


@register
def squared_gap(power: float = 2.0):
    \"\"\"Σ |p − q|^power.\"\"\"

    def terms(p, q, log_p, log_q):
        gap = q - p
        return gap.abs() ** power, power * q * gap.sign() * gap.abs() ** (power - 1)

    return terms
"""


def test_a_divergence_from_a_plugin_trains_a_student(configure, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    own = {"plugins": [str(file)], "kd_objective": "squared_gap", "max_steps": 2, "eval_steps": 0}
    run = DistillPipeline(configure(**own)).run()
    assert 0 < run.metrics["train/train_distill_loss"] < 2
    other = configure(**own, output_dir=str(tmp_path / "other"), kd_objective_kwargs={"power": 1.0})
    assert DistillPipeline(other).run().metrics["train/train_distill_loss"] > run.metrics["train/train_distill_loss"]
    wrong = configure(**own, output_dir=str(tmp_path / "wrong"), kd_objective_kwargs={"strength": 1.0})
    with pytest.raises(LimbeckError, match="squared_gap does not take these parameters"):
        DistillPipeline(wrong).run()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("1/0", "ZeroDivisionError"), ("", "kd_objective = mine_own is not one")],
)
def test_a_plugin_that_fails_is_an_error(configure, tmp_path, content, message):
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(LimbeckError, match=message):
        configure(plugins=[str(file)], kd_objective="mine_own")


def test_taid_changes_with_the_steps_and_resumes_exactly(configure, tmp_path):
    changes = {
        "kd_objective": "taid", "kd_objective_kwargs": {"t_start": 0.2, "rate": 0.3, "momentum": 0.5}, "eval_steps": 0,
        "student.training_args.num_train_epochs": 9,
    }  # fmt: skip
    config = configure(**changes)
    DistillPipeline(config).run()
    out = Path(config.output_dir)
    shutil.copytree(out, tmp_path / "full", symlinks=True)
    forget_after(out, 5)
    DistillPipeline(configure(**changes, resume_from_checkpoint=True)).run()
    assert_same_weights(tmp_path / "full" / "checkpoint-12", out / "checkpoint-12")
    forget_after(out, 5)
    with pytest.raises(LimbeckError, match="speed is not read by kd_objective = taid"):
        DistillPipeline(configure(**{**changes, "kd_objective_kwargs": {"speed": 1.0}, "output_dir": "x"})).run()


def test_topk_metrics_are_written(configure):
    changes = {"logits_topk": 5, "logits_topk_tail": "bucket", "max_steps": 2, "eval_steps": 0}
    found = DistillPipeline(configure(**changes)).run().metrics
    assert 0 < found["train/topk_mass"] < 1
    assert 0 <= found["train/topk_overlap"] <= 1


@pytest.mark.processes
def test_a_compiled_run_gives_the_losses_of_an_eager_run(configure, tmp_path):
    found = [
        DistillPipeline(
            configure(compile_loss=compiled, max_steps=3, eval_steps=0, output_dir=str(tmp_path / str(compiled)))
        ).run()
        for compiled in (False, True)
    ]
    plain, compiled = (run.metrics for run in found)
    for name in ("train/loss", "train/train_distill_loss", "student/grad_norm", "train/teacher_entropy"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-5)


def test_a_tracker_from_a_plugin_receives_every_line(configure, tmp_path):
    file = tmp_path / "tracker.py"
    file.write_text(
        """
from limbeck import register_tracker


class Steps:
    def __init__(self, folder, kwargs):
        self.file = (folder / kwargs["name"]).open("w")

    def log(self, step, values):
        print(step, "train/loss" in values, file=self.file)

    def close(self):
        self.file.close()


register_tracker("steps", Steps)
"""
    )
    logs = tmp_path / "logs"
    logs.mkdir()
    keys = {"track_with": "steps", "tracker_kwargs": {"name": "steps.txt"}, "logging_dir": str(logs)}
    DistillPipeline(configure(plugins=[str(file)], max_steps=2, eval_steps=0, **keys)).run()
    (written,) = tmp_path.rglob("steps.txt")
    assert written.read_text() == "1 True\n2 True\n"
