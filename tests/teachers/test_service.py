"""A teacher service gives several runs the numbers of one process, refuses what does not fit, and leaves no process."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from launch.test_driver import processes, ray_of_tests, run_on_ray
from runs import metrics, rows

from limbeck.errors import LimbeckError

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.workers

# Variables that Ray sets in this process; a user's shell does not have them.
INHERITED = ("RAY_ADDRESS", "RAY_AUTH_MODE")
NO_SHARDING = {"teacher.strategy_args.strategy_name": "hf_infer"}


@pytest.fixture(scope="module", autouse=True)
def _ray():
    """One Ray for this file, which the services join."""
    with ray_of_tests():
        yield


@contextmanager
def served(settings: dict, folder: Path, *words: str, address: str | None = "", ended_by: int = signal.SIGINT):
    """A service in a process of its own, ended by a signal; yields the process and its line "Serving …"."""
    from limbeck.cluster.session import ray_address

    config = folder / "service.yaml"
    config.write_text(yaml.safe_dump(settings))
    environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
    if address is not None:
        environment["RAY_ADDRESS"] = address or ray_address()
    process = subprocess.Popen(
        [sys.executable, "-m", "limbeck", "serve-teacher", str(config), *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    output = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if line.startswith("Serving"):
                yield process, line
                break
        else:
            raise AssertionError(output)
    finally:
        if process.poll() is None:
            process.send_signal(ended_by)
        output += process.communicate(timeout=60)[0]
        assert process.returncode in (0, 2, -signal.SIGKILL), output


def gone(name: str) -> bool:
    deadline = time.monotonic() + 30
    while processes(name) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes(name)


def client(students: int, folder: Path, **changes) -> dict:
    return {
        "teacher.service": "judge",
        "student.device_mapping": list(range(students)),
        "output_dir": str(folder),
        **rows(8 // students),
        **changes,
    }


def test_two_runs_at_once_share_one_service_and_have_the_losses_of_one_process(alone, configure, settings, tmp_path):
    from limbeck.cluster.groups import registered_groups

    top = {"logits_topk": 5}
    runs = [configure(**client(2, tmp_path / "two-ranks")), configure(**client(1, tmp_path / "one-rank"))]
    failures: list[BaseException] = []

    def run(config) -> None:
        try:
            run_on_ray(config)
        except BaseException as error:
            failures.append(error)

    service = settings(**{"teacher.device_mapping": [0, 1], "output_dir": str(tmp_path / "served")}, **NO_SHARDING)
    with served(service, tmp_path, "--name", "judge", ended_by=signal.SIGTERM):
        threads = [threading.Thread(target=run, args=(config,)) for config in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert registered_groups() == {"judge": 2}  # they outlive the runs
        run_on_ray(configure(**client(1, tmp_path / "later", **top)))
    assert gone("TeacherWorker")
    for name, one in (("two-ranks", alone()), ("one-rank", alone()), ("later", alone(**top))):
        for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss", "val/top1_agreement"):
            expected = metrics(one, key)
            assert metrics(tmp_path / name, key) == pytest.approx(expected, rel=1e-5, abs=1e-5), (name, key)


def test_a_run_that_does_not_fit_the_service_is_refused_and_the_service_goes_on(configure, settings, assets, tmp_path):
    with served(settings(output_dir=str(tmp_path / "served"), **{"teacher.service": "judge"}), tmp_path):
        for changes, sentence in (
            (
                {"teacher_pretrain": str(assets / "student")},
                "was started with teacher.model_args.model_name_or_path = ",
            ),
            ({"teacher.model_args.dtype": "bf16"}, r"teacher.model_args.dtype = fp32 \(this run: bf16\)"),
            ({"student.use_sequence_packing": True}, r"student.use_sequence_packing = False \(this run: True\)"),
            ({"teacher.service": "other"}, r"no teacher service named other on this Ray \(services: judge\)"),
        ):
            with pytest.raises(LimbeckError, match=sentence):
                run_on_ray(configure(**client(1, tmp_path / "out", **changes)))
        taken = pytest.raises(AssertionError, match="a teacher service named judge is running already")
        with taken, served(settings(), tmp_path, "--name", "judge"):
            pass
        run_on_ray(configure(**client(1, tmp_path / "out")))


def test_a_killed_service_leaves_no_process_and_its_run_ends_with_an_error(configure, settings, tmp_path):
    with served(settings(output_dir=str(tmp_path / "served")), tmp_path, "--name", "judge") as (process, _):

        def log(line: str) -> None:
            if "step 2/" in line:
                os.kill(process.pid, signal.SIGKILL)

        with pytest.raises(LimbeckError, match=r"teacher service judge has ended; start it again\. The run "):
            run_on_ray(configure(**client(1, tmp_path / "out", max_steps=4000, eval_steps=0)), log)
    assert gone("TeacherWorker")


def test_a_service_starts_a_ray_and_prints_its_address_if_there_is_none(settings, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(**client(1, tmp_path / "out"), max_steps=2)))
    command = [sys.executable, "-m", "limbeck", "train", str(config)]
    environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
    alone = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert alone.returncode == 2
    assert "teacher.service = judge is on a Ray that this run must join; set RAY_ADDRESS" in alone.stderr
    teacher = settings(output_dir=str(tmp_path / "served"))
    with served(teacher, tmp_path, "--name", "judge", address=None) as (service, line):
        environment["RAY_ADDRESS"] = line.split("RAY_ADDRESS=")[1].split()[0]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        # Its Ray ends with the service, also during a run.
        longer = [
            *command,
            "max_steps=5000",
            "resume_from_checkpoint=true",
            "student.training_args.num_train_epochs=999",
        ]
        train = subprocess.Popen(longer, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert train.stdout is not None
        for line in train.stdout:
            if "step 5/" in line:
                service.send_signal(signal.SIGINT)
                break
        output = train.communicate(timeout=90)[0]
        service.wait(timeout=60)  # a second signal, while Python exits, would kill it
    assert train.returncode == 2, output
    assert re.search(r"teacher service judge( has ended)?; start it again\. The run goes on from its last", output), (
        output
    )
    assert "(restart 1 of" not in output
    assert len(metrics(tmp_path / "out", "train/loss")) >= 5


@pytest.mark.parametrize(
    ("changes", "name", "sentence"),
    [
        ({"teacher.device_mapping": [0, 1]}, None, "over which the teacher would be sharded, and several runs cannot"),
        ({"teacher_pretrain": None, "distill_loss_weight": 0}, None, "no teacher to serve; set teacher_pretrain"),
        ({}, "a/b", "'a/b' is not a valid service name"),
    ],
)
def test_a_teacher_that_cannot_be_served_is_refused(configure, changes, name, sentence):
    from limbeck.teachers.service import serve_teacher

    with pytest.raises(LimbeckError, match=sentence):
        serve_teacher(configure(**changes), name)
