"""What the loop logs, validates and saves at which step, and that trackers are closed."""

import io
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from runs import forget_after
from strategies.engines import ALONE

from limbeck import DistillPipeline, LimbeckError
from limbeck.interrupt import StopRequest
from limbeck.registry import TRACKERS
from limbeck.train.build.run import build_run
from limbeck.train.checkpoint import list_checkpoints
from limbeck.train.loop import Surroundings


class RecordingTracker:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1

    def steps(self, key: str) -> list[int]:
        return [step for step, values in self.lines if key in values]


@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setattr(TRACKERS, "_registered", dict(TRACKERS._registered))
    made = RecordingTracker()
    TRACKERS.register("recording")(lambda log_dir, kwargs: made)
    return made


def saved(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in list_checkpoints(folder)]


def run(configure, *, stop: StopRequest | None = None, console: io.StringIO | None = None, **changes):
    config = configure(**{"track_with": "recording", "max_steps": 7, "max_ckpt_to_keep": 0, **changes})
    surroundings = Surroundings(stop=stop or StopRequest(), console=console)
    return DistillPipeline(config).run_in(ALONE, surroundings)


@pytest.mark.parametrize(
    ("every", "logged", "validated", "kept"),
    [
        # A step that saves is logged and validated too, and so is the last one.
        ({"logging_steps": 3, "eval_steps": 2, "save_steps": 5}, [3, 5, 6, 7], [2, 4, 5, 6, 7], [5, 7]),
        ({"logging_steps": 2, "eval_steps": 3, "save_steps": 0}, [2, 4, 6, 7], [3, 6, 7], [7]),
        ({"logging_steps": 100, "eval_steps": 0, "save_steps": 4}, [4, 7], [], [4, 7]),
        ({"logging_steps": 100, "eval_steps": 100, "save_steps": 0}, [7], [7], [7]),
    ],
)
def test_steps_that_log_validate_and_save(configure, tracker, tmp_path, every, logged, validated, kept):
    result = run(configure, **every)
    assert (tracker.steps("train/loss"), tracker.steps("val/loss")) == (logged, validated)
    assert saved(tmp_path / "out") == kept
    assert tracker.closed == 1
    assert (result.step, result.stopped_by, result.student) == (7, 0, tmp_path / "out" / "checkpoint-7")
    assert result.metrics == {name: value for _, values in tracker.lines for name, value in values.items()}
    written = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(line.pop("step"), line) for line in written if line.pop("time")] == tracker.lines


def test_the_logged_loss_is_the_mean_of_the_steps_since_the_last_line(configure, tracker, tmp_path):
    quiet = {"eval_steps": 0, "save_steps": 0, "max_steps": 6}
    run(configure, **quiet, logging_steps=1, output_dir=str(tmp_path / "each"))
    each = [values["train/loss"] for _, values in tracker.lines]
    tracker.lines.clear()
    run(configure, **quiet, logging_steps=3, output_dir=str(tmp_path / "third"))
    found = [values["train/loss"] for _, values in tracker.lines]
    assert found == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])
    assert [step for step, _ in tracker.lines] == [3, 6]


def test_the_checkpoint_of_a_step_that_saves_has_its_validation_metric(configure, tracker, tmp_path):
    run(configure, save_steps=3, eval_steps=100)
    losses = {step: values["val/loss"] for step, values in tracker.lines if "val/loss" in values}
    for _, values in tracker.lines:
        assert values.get("student/val_loss") == values.get("val/ce")
    for step in (3, 6, 7):
        manifest = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "manifest.json").read_text())
        assert manifest["metric"] == losses[step]


def test_a_stop_ends_after_the_step_with_a_log_line_a_checkpoint_and_no_validation(configure, tracker, tmp_path):
    class Third(StopRequest):
        def poll(self) -> int:
            super().poll()
            return 15 if self.polls == 3 else 0

    console = io.StringIO()
    result = run(configure, stop=Third(), console=console, logging_steps=100, save_steps=0, eval_steps=3)
    assert (result.step, result.stopped_by) == (3, 15)
    assert (saved(tmp_path / "out"), tracker.steps("train/loss"), tracker.steps("val/loss")) == ([3], [3], [])
    assert "Stopped by SIGTERM after step 3; resume_from_checkpoint=true goes on" in console.getvalue()
    assert tracker.closed == 1


def test_a_finished_run_that_resumes_writes_its_checkpoint_only_where_there_is_none(configure, tracker, tmp_path):
    run(configure, max_steps=2, eval_steps=0)
    path = tmp_path / "out" / "checkpoint-2"
    before = (path / "manifest.json").stat().st_mtime_ns
    result = run(configure, max_steps=2, eval_steps=0, resume_from_checkpoint=True)
    assert result.student == path
    assert (path / "manifest.json").stat().st_mtime_ns == before
    elsewhere = run(
        configure, max_steps=2, eval_steps=0, resume_from_checkpoint=str(path), output_dir=str(tmp_path / "b")
    )
    assert saved(tmp_path / "b") == [2]
    assert elsewhere.step == 2


def test_trackers_are_closed_after_an_error(configure, tracker):
    huge = {"student.training_args.learning_rate": 1e30, "student.training_args.lr_scheduler_type": "constant"}
    with pytest.raises(LimbeckError, match=r"train/loss is nan at step \d: the run has diverged"):
        run(configure, **huge, max_grad_norm=0.0)
    assert tracker.closed == 1
    assert tracker.lines


def test_metrics_of_an_earlier_run_are_set_apart_and_those_of_a_resumed_run_appended(configure, tracker, tmp_path):
    out = tmp_path / "out"
    run(configure, max_steps=4, save_steps=2, eval_steps=0)
    first = (out / "metrics.jsonl").read_text()
    forget_after(out, 2)
    run(configure, max_steps=4, save_steps=2, eval_steps=0, resume_from_checkpoint=True)
    both = (out / "metrics.jsonl").read_text()
    assert both.startswith(first)
    assert [json.loads(line)["step"] for line in both.splitlines()] == [1, 2, 3, 4, 3, 4]
    forget_after(out, 0)
    run(configure, max_steps=1, save_steps=0, eval_steps=0)
    assert (out / "metrics.previous.jsonl").read_text() == both
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


def test_run_json_describes_the_run(configure, tmp_path):
    config = configure(max_steps=1, exp_name="trial")
    built = build_run(config, ALONE, ExitStack())
    built.source.close()
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    sizes = {
        "student": sum(p.numel() for p in built.student.model.parameters()),
        "teacher": built.teacher.info.num_parameters,
    }
    assert (facts["exp_name"], facts["ranks"], facts["device"]) == ("trial", 1, "cpu")
    assert facts["parameters"] == sizes
    assert facts["student"] == config.student_pretrain
    assert facts["teacher"] == config.teacher_pretrain
    assert facts["data"] == built.data.report
    assert facts["config"]["max_steps"] == 1


def test_the_console_shows_the_run_its_lines_and_the_validation(configure, tracker):
    console = io.StringIO()
    run(configure, console=console, max_steps=2, save_steps=0, eval_steps=2)
    text = console.getvalue()
    assert "2 steps of 8 × 1 × 1 rows on 1 × cpu" in text
    assert "step 1/2  loss " in text
    assert "step 2/2  loss " in text
    assert text.count("val/loss ") == 1


def test_all_missing_files_are_named_at_once(configure, tmp_path):
    nowhere = {"student_pretrain": str(tmp_path / "no-student"), "teacher_pretrain": str(tmp_path / "no-teacher")}
    with pytest.raises(LimbeckError, match=r"(?s)no-student.*\n.*no-teacher"):
        build_run(configure(**nowhere), ALONE, ExitStack())


def test_the_teachers_metrics_are_logged_with_the_training_loss(configure, tracker, monkeypatch):
    monkeypatch.setattr("limbeck.teachers.local.LocalTeacher.metrics", lambda self: {"transport/waiting": 1.0})
    run(configure, max_steps=2, save_steps=0, logging_steps=1, eval_steps=1)
    assert tracker.steps("transport/waiting") == tracker.steps("train/loss") == [1, 2]
    assert not any("transport/waiting" in values for _, values in tracker.lines if "val/loss" in values)


def test_a_tracker_without_a_method_is_refused_before_training(configure):
    TRACKERS.register("incomplete")(lambda log_dir, kwargs: object())
    with pytest.raises(LimbeckError, match="track_with = incomplete lacks log, close; define them in the class object"):
        DistillPipeline(configure(track_with="incomplete")).run()
