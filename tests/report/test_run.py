import json

import pytest

from limbeck.errors import LimbeckError
from limbeck.report import load_run, write_report


def write(folder, rows, tail="", facts=None):
    (folder / "run.json").write_text(json.dumps(facts or {"exp_name": "night"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def training(step, loss):
    return {"step": step, "time": 0.0, "train/loss": loss}


def validation(step, loss):
    return {"step": step, "time": 0.0, "val/loss": loss}


def test_training_and_validation_of_a_step_share_a_row(tmp_path):
    run = load_run(write(tmp_path, [training(1, 3.0), training(2, 2.0), validation(2, 2.5), training(3, 1.0)]))
    assert run.name == "night"
    assert run.curve("train/loss").values.tolist() == [3.0, 2.0, 1.0]
    assert run.curve("val/loss").steps.tolist() == [2.0]
    assert run.notices == ()


def test_a_resumed_run_overwrites_the_steps_it_repeats(tmp_path):
    first = [
        training(1, 9.0),
        training(2, 8.0),
        {"step": 2, "val/loss": 8.5},
        training(3, 7.0),
        {"step": 3, "val/loss": 7.5},
    ]
    run = load_run(write(tmp_path, [*first, training(3, 1.0), training(4, 0.5)]))
    assert run.curve("train/loss").steps.tolist() == [1, 2, 3, 4]
    assert run.curve("train/loss").values.tolist() == [9.0, 8.0, 1.0, 0.5]
    assert run.curve("val/loss").steps.tolist() == [2], "the abandoned attempt's validation at step 3 is gone"


def test_steps_that_only_the_abandoned_attempt_reached_are_dropped(tmp_path):
    run = load_run(write(tmp_path, [*(training(step, 5.0) for step in range(1, 9)), training(4, 1.0)]))
    assert run.curve("train/loss").steps.tolist() == [1, 2, 3, 4]


def test_an_incomplete_last_line_is_skipped_with_a_notice(tmp_path):
    run = load_run(write(tmp_path, [training(1, 3.0)], tail='{"step": 2, "train/lo'))
    assert run.curve("train/loss").steps.tolist() == [1]
    assert "line 2" in run.notices[0]


def test_a_run_resumed_after_an_incomplete_line_loses_only_that_line(tmp_path):
    write(tmp_path, [training(1, 3.0)], tail='{"step": 2, "tr\n' + json.dumps(training(2, 2.0)) + "\n")
    assert load_run(tmp_path).curve("train/loss").values.tolist() == [3.0, 2.0]


def test_a_non_finite_loss_is_left_out_of_the_curve_with_a_notice(tmp_path):
    run = load_run(write(tmp_path, [training(1, 3.0), training(2, float("nan")), training(3, float("inf"))]))
    assert run.curve("train/loss").steps.tolist() == [1]
    assert "2 logged steps, first at step 2" in run.notices[0]


@pytest.mark.parametrize("missing", ["run.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path, missing):
    write(tmp_path, [training(1, 3.0)])
    (tmp_path / missing).unlink()
    with pytest.raises(LimbeckError, match=missing):
        load_run(tmp_path)


def test_a_torn_run_json_is_named(tmp_path):
    write(tmp_path, [training(1, 3.0)])
    (tmp_path / "run.json").write_text('{"exp_name": "ni')
    with pytest.raises(LimbeckError, match=r"run\.json contains no JSON object"):
        load_run(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", "nothing of the kind\n", '{"loss": 1}\n'])
def test_metrics_without_a_measurement_are_refused(tmp_path, content):
    write(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(LimbeckError, match="contains no measurement"):
        load_run(tmp_path)


def test_the_first_answers_of_the_newest_validation_are_shown_and_escaped(tmp_path):
    (tmp_path / "rollouts").mkdir()
    answer = {
        "origin": "student",
        "prompt": "<b>2 + 2?",
        "completion": "<script>4",
        "reward": None,
        "reason": "timeout",
    }
    for name, text in (("val-2", "old"), ("val-10", "<script>4"), ("train-11", "in training")):
        rows = (
            {**answer, "completion": text},
            {**answer, "origin": "dataset"},
            {**answer, "reward": 1.0, "reason": ""},
        )
        lines = "\n".join(map(json.dumps, rows)) + '\n{"prompt": "torn'
        (tmp_path / "rollouts" / f"{name}.jsonl").write_text(lines)
    run = load_run(write(tmp_path, [training(1, 3.0)]))
    assert [(sample.step, sample.reward) for sample in run.samples] == [(10, None), (10, 1.0)]
    html = write_report([run], tmp_path / "report.html", title="night").read_text()
    assert "&lt;script&gt;4" in html
    assert "<script>4" not in html
    assert "no reward (timeout)" in html
    for file in (tmp_path / "rollouts").glob("val-*"):
        file.unlink()
    assert [(sample.step, sample.completion) for sample in load_run(tmp_path).samples[:1]] == [(11, "in training")]
