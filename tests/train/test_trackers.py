"""Trackers, with their own libraries, which store everything on this machine."""

import importlib.util
import socket
import sys
import time
from pathlib import Path

import pytest

from limbeck import DistillPipeline
from limbeck.errors import LimbeckError
from limbeck.train.trackers import BackgroundTracker, check_trackers, make_trackers

LIBRARIES = ("wandb", "mlflow", "swanlab")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # without the login of a user
    for name in ("WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def contents(folder: Path, pattern: str) -> bytes:
    (found,) = folder.rglob(pattern)
    return found.read_bytes()


def check_stored_wandb(folder: Path) -> None:
    stored = contents(folder, "run-*.wandb")
    assert b"train/loss" in stored and b"val/loss" in stored and b"report" in stored


def check_stored_mlflow(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(str(folder / "mlruns"))
    experiment = client.get_experiment_by_name("sums")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert [one.step for one in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    assert b"<svg" in contents(folder / "mlruns", "report.html")


def check_stored_swanlab(folder: Path) -> None:
    stored = contents(folder, "run-*.swanlab")
    assert b"train/loss" in stored and b"val/loss" in stored
    assert b"<svg" in contents(folder / "swan", "report.html")


@pytest.mark.slow
def test_each_library_stores_the_metrics_and_the_report_of_a_run(configure, tmp_path):
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    if not installed:
        pytest.skip("no library of a tracker is installed")
    arguments = {
        "wandb": {"project": "sums", "tags": ["tiny"]},
        "mlflow": {"tracking_uri": str(tmp_path / "mlruns"), "experiment_name": "sums", "run_name": "first"},
        "swanlab": {"project": "sums", "experiment_name": "first", "log_dir": str(tmp_path / "swan")},
    }
    chosen = {name: arguments[name] for name in installed}
    DistillPipeline(
        configure(max_steps=2, eval_steps=1, track_with=["tensorboard", *installed], tracker_kwargs=chosen)
    ).run()
    assert list((tmp_path / "out" / "logs").glob("events.*"))
    checks = {"wandb": check_stored_wandb, "mlflow": check_stored_mlflow, "swanlab": check_stored_swanlab}
    for name in installed:
        checks[name](tmp_path)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_an_error_before_models_are_loaded(configure, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = configure(track_with=name, student_pretrain="nobody/has-this-model")
    with pytest.raises(LimbeckError, match=rf"pip install 'limbeck\[{name}\]'"):
        DistillPipeline(config).run()


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_missing_login_is_an_error_before_models_are_loaded(configure, monkeypatch, name):
    library = pytest.importorskip(name)
    if name == "wandb":
        library.teardown()  # it keeps the settings of the process
    monkeypatch.delenv(f"{name.upper()}_MODE")
    config = configure(track_with=name, student_pretrain="nobody/has-this-model")
    with pytest.raises(LimbeckError, match=rf"{name} cannot be used: .*; set {name.upper()}_API_KEY"):
        DistillPipeline(config).run()
    check_trackers({name: {"mode": "offline"}})


def test_a_database_of_mlflow_needs_the_whole_package(monkeypatch):
    pytest.importorskip("mlflow")
    if importlib.util.find_spec("sqlalchemy") is not None:
        pytest.skip("the whole package is installed")
    with pytest.raises(LimbeckError, match="would store its runs with sqlite, which needs the whole package mlflow"):
        check_trackers({"mlflow": {"tracking_uri": "sqlite:///runs.db"}})


def test_a_server_that_does_not_respond_does_not_end_the_run(tmp_path):
    pytest.importorskip("mlflow")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    arguments = {"tracking_uri": f"http://me:s3cr3t@{address}"}
    check_trackers({"mlflow": arguments})
    (tracker,) = make_trackers({"mlflow": arguments}, tmp_path)
    tracker.log(1, {"train/loss": 0.5})
    tracker.close()
    (notice,) = tracker.notices()
    assert notice.startswith("the tracker mlflow could not start (") and "s3cr3t" not in notice


class Broken:
    """A tracker whose network is down from step 2 on."""

    def __init__(self) -> None:
        self.logged: list[int] = []

    def log(self, step, values):
        if step > 1:
            raise ConnectionError(f"no route to http://me:pass@host/ with {values['key']}")
        self.logged.append(step)

    def close(self):
        raise ConnectionError("no route")


def test_failures_are_one_notice_and_counted(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t")
    broken = Broken()
    tracker = BackgroundTracker("broken", broken)
    for step in (1, 2, 3):
        tracker.log(step, {"key": "s3cr3t"})
    tracker.close()
    tracker.close()
    first, last = tracker.notices()
    assert "failed (no route to http://host/ with (SOME_API_KEY)); the run goes on" in first
    assert last == "the tracker broken failed 3 times."
    assert broken.logged == [1]


def test_a_tracker_that_does_not_respond_does_not_hold_up_a_run(monkeypatch):
    monkeypatch.setattr("limbeck.train.trackers._CLOSE_SECONDS", 0.05)
    hanging = Broken()
    hanging.log = lambda step, values: time.sleep(30)
    tracker = BackgroundTracker("hanging", hanging)
    tracker.log(1, {})
    tracker.close()
    assert tracker.notices() == ["the tracker hanging has not stored everything after 0.05 seconds."]


def test_a_run_goes_on_without_its_tracker(configure, monkeypatch, capsys):
    from limbeck.registry import TRACKERS

    monkeypatch.setattr(TRACKERS, "_registered", dict(TRACKERS._registered))
    TRACKERS.register("broken")(lambda log_dir, kwargs: Broken())
    result = DistillPipeline(configure(track_with="broken", max_steps=3)).run()
    assert result.step == 3
    shown = capsys.readouterr().out
    assert shown.count("the tracker broken failed (") == 1
