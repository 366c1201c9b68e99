"""Two runs do not write into one folder, and the lock of a run that has ended does not keep the next one out."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from limbeck import DistillPipeline, LimbeckError, cli
from limbeck.launch import start
from limbeck.train import run_lock
from limbeck.train.run_lock import LOCK_FILE, lock_run


@pytest.fixture
def other_run(tmp_path):
    """``other_run(**changes)`` writes the lock file of another run, by default of this running process."""

    def write(**changes) -> Path:
        holder = {**vars(run_lock._this_process("other")), "host": "node-7", **changes}
        (tmp_path / "out").mkdir(exist_ok=True)
        path = tmp_path / "out" / LOCK_FILE
        path.write_text(json.dumps(holder))
        return path

    return write


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


IN_USE = rf"is in use by another run: process {os.getpid()} on node-7, started \d{{4}}-"


def test_a_second_run_is_refused_before_anything_is_loaded(configure, other_run):
    other_run()
    with pytest.raises(LimbeckError, match=IN_USE):
        DistillPipeline(configure(student_pretrain="/nowhere/at/all")).run()


def test_a_second_run_is_refused_before_its_processes_start(settings, other_run, tmp_path, monkeypatch, capsys):
    other_run()
    monkeypatch.setattr(start, "run_ranks", None)
    monkeypatch.setattr(start, "_train_on_ray", None)
    for devices in (
        {},
        {"student.device_mapping": [0, 1]},
        {"student.device_mapping": [0], "teacher.device_mapping": [1]},
    ):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(**devices)))
        assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
        assert f"process {os.getpid()} on node-7" in capsys.readouterr().err


def test_folders_of_checkpoints_are_locked_too(configure, other_run, tmp_path):
    other_run()
    config = configure(output_dir=str(tmp_path / "mine"), **{"checkpoint_config.output_dir": str(tmp_path / "out")})
    with pytest.raises(LimbeckError, match=IN_USE), lock_run(config):
        pass
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("stale", ["ended", "other process with that id", "other boot, long ago", "cut off"])
def test_the_lock_of_a_run_that_has_ended_is_taken_over(configure, other_run, monkeypatch, stale):
    monkeypatch.setattr(run_lock, "_WRITING_SECONDS", 0.1)
    if stale == "ended":
        path = other_run(pid=ended_process())
    elif stale == "other process with that id":
        path = other_run(process_start=1)
    else:
        path = other_run(machine="other")
        if stale == "cut off":
            path.write_text("{")
        os.utime(path, (time.time() - 100,) * 2)
    with lock_run(configure()):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("beats", [True, False])
def test_a_run_on_another_machine_counts_as_running_while_its_heart_beats(configure, other_run, monkeypatch, beats):
    path, ended = other_run(machine="other"), threading.Event()
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "_STALE_SECONDS", 1)
    heart = threading.Thread(target=run_lock._beat, args=(path, ended))
    if beats:
        heart.start()
        with pytest.raises(LimbeckError, match=IN_USE), lock_run(configure()):
            pass
        ended.set()
        heart.join()
    else:
        with lock_run(configure()):
            assert json.loads(path.read_text())["machine"] != "other"


@pytest.mark.processes
def test_the_processes_of_one_run_share_the_folder_and_a_killed_one_leaves_it_locked_by_the_other(configure, tmp_path):
    config = configure()
    script = (
        "import json, sys; from limbeck.config import DistillConfig; from limbeck.train.run_lock import lock_run\n"
        "with lock_run(DistillConfig.model_validate(json.loads(sys.argv[1]))):\n"
        "    print('holds', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, json.dumps(config.model_dump(mode="json"))]
    path = tmp_path / "out" / LOCK_FILE
    with lock_run(config):
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "holds\n"
        assert json.loads(path.read_text())["pid"] == child.pid, "it outlives its parent"
    assert not path.exists()
    child.communicate("")
    assert child.returncode == 0
    stranger = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert stranger.stdout.readline() == "holds\n"
    with pytest.raises(LimbeckError, match=f"process {stranger.pid} on"), lock_run(config):
        pass
    stranger.kill()
    stranger.communicate()
    with lock_run(config):
        pass


@pytest.mark.parametrize("key", ["output_dir", "checkpoint_config.output_dir", "logging_dir"])
def test_a_folder_that_cannot_be_written_to_is_an_error_before_anything_is_loaded(configure, tmp_path, key):
    (tmp_path / "file").touch()
    changes = {key: str(tmp_path / "file" / "out"), "student_pretrain": "/nowhere/at/all"}
    with pytest.raises(LimbeckError, match=rf"^{key} = .*file/out' cannot be written to: Not a directory; set another"):
        DistillPipeline(configure(**changes)).run()
    assert not (tmp_path / "out").exists()
