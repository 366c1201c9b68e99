"""Student and teacher as groups of Ray workers give the numbers of one process, also after faults."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from runs import assert_same_weights, metrics, rows

from limbeck.errors import LimbeckError

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.workers

OURS = ("LIMBECK_TESTED_BY", str(os.getpid()))
"""In the environment of every worker that is started here; other runs on the machine do not have it."""


@contextmanager
def ray_of_tests():
    from limbeck.cluster.session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*OURS)
        with ray_session(8):
            yield


@pytest.fixture(scope="module", autouse=True)
def _ray():
    """One Ray for this file: runs in this process find it there."""
    with ray_of_tests():
        yield


def teacher_size(key: str) -> dict:
    return {f"teacher.strategy_args.strategy_config.{key}": 2}


def run_on_ray(config, log=lambda line: None):
    from limbeck.launch.on_ray import run_on_ray

    return run_on_ray(config, log)


def processes(name: str) -> list[int]:
    """Process ids of the workers of class ``name`` that are started here."""
    found, mark = [], "=".join(OURS).encode()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            ours = mark in entry.with_name("environ").read_bytes().split(b"\0")
            if ours and entry.read_bytes().startswith(f"ray::{name}".encode()):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def groups(students: int, teachers: int, **changes) -> dict:
    return {
        "student.device_mapping": list(range(students)),
        "teacher.device_mapping": list(range(students, students + teachers)),
        **rows(8 // students),
        **changes,
    }


KEYS = ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss", "val/top1_agreement")
COLOCATED = {"teacher.device_mapping": [1], "is_offload_states": True, "offload_interval": 3}
NO_SHARDING = {"teacher.strategy_args.strategy_name": "hf_infer"}
TENSOR_PARALLEL = {
    "student.strategy_args.strategy_config.tensor_model_parallel_size": 2,
    "student.training_args.adam_epsilon": 1e-4,  # else rounding near a gradient of 0 grows to whole steps
}
ZERO = {
    f"{role}.strategy_args.{key}": value
    for role, name, stage in (("student", "deepspeed_train", 2), ("teacher", "deepspeed_infer", 3))
    for key, value in (("strategy_name", name), ("strategy_config", {"zero_optimization": {"stage": stage}}))
}
LONG = {"max_steps": 120, "save_steps": 20, "eval_steps": 0, "logging_steps": 5}


@pytest.mark.parametrize(
    "changes",
    [groups(2, 1, **COLOCATED), groups(1, 2), groups(2, 3, **NO_SHARDING), groups(2, 3)],
    ids=["two-colocated-with-one", "one-to-two-shards", "two-to-three-copies", "two-to-three-shards"],
)
def test_groups_give_the_losses_of_one_process(alone, configure, tmp_path, changes):
    lines = []
    run_on_ray(configure(**changes), lines.append)
    one, out = alone(), tmp_path / "out"
    for key in KEYS:
        assert metrics(out, key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), key
    assert set(metrics(out, "transport/bytes_per_token")) == {48 * 4.0}
    assert ("is_offload_states" in changes) == any(
        "each is offloaded while the other computes" in line for line in lines
    )


@pytest.mark.parametrize(
    "changes",
    [
        groups(2, 2, **TENSOR_PARALLEL, **teacher_size("context_parallel_size"), **rows(8)),
        groups(1, 2, **teacher_size("tensor_model_parallel_size"), **{"student.use_sequence_packing": True}),
        groups(1, 2, **teacher_size("pipeline_model_parallel_size")),
        groups(2, 2, **ZERO),
    ],
    ids=["tp2-to-cp2", "packed-to-tp2", "to-pp2", "zero"],
)
def test_each_group_may_use_its_own_parallelism(alone, configure, tmp_path, changes):
    if changes.keys() & ZERO.keys():
        pytest.importorskip("deepspeed")
    short = {"max_steps": 4, "eval_steps": 0, "save_steps": 0}
    kept = ("student.training_args.adam_epsilon", "student.use_sequence_packing")
    one = alone(**short, **{key: value for key, value in changes.items() if key in kept})
    run_on_ray(configure(**short, **changes))
    for key in ("train/loss", "student/grad_norm", "val/loss"):
        assert metrics(tmp_path / "out", key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), key
    assert_same_weights(one / "student", tmp_path / "out" / "student", tolerance=1e-5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed") / "out"


@pytest.mark.parametrize("backend", ["ray", "gloo"])
def test_a_run_that_loses_workers_gives_the_weights_of_an_undisturbed_run(configure, undisturbed, tmp_path, backend):
    if not undisturbed.exists():
        run_on_ray(configure(**groups(2, 1), **LONG, output_dir=str(undisturbed)))
    lines, faults = [], {"step 25/": ("TeacherWorker", signal.SIGKILL)}
    if backend == "ray":
        faults |= {"step 35/": ("StudentWorker", signal.SIGKILL), "step 45/": ("StudentWorker", signal.SIGSTOP)}

    def log(line: str) -> None:
        lines.append(line)
        for step in [step for step in faults if step in line]:
            victim, number = faults.pop(step)
            os.kill(processes(victim)[-1], number)

    backends = {"student.backend_timeout": 0.3, "logits_transfer_backend": backend}
    run_on_ray(configure(**groups(2, 1), **LONG, max_restarts=5, **backends), log)
    assert not faults
    # Ray replaces a teacher that holds a whole copy without a restart of the run, except with direct transfers. On a slow
    # machine it may count as hung once.
    restarts = sum("goes on from its last checkpoint" in line for line in lines)
    least = 1 if backend == "gloo" else 2
    assert least <= restarts <= least + 1
    # The line names the worker that was lost, not a peer that failed because of it.
    named = [line for line in lines if "goes on from its last checkpoint" in line]
    assert all(" died (ActorDiedError). The run" in line or " does not respond. The run" in line for line in named), (
        named
    )
    assert any("does not respond" in line for line in named) == (backend == "ray")
    assert any(line.startswith("Resumed from") for line in lines)
    replaced = any(line.startswith("teacher-0 died; Ray has started it again (process ") for line in lines)
    assert replaced == (backend == "ray")
    if replaced:
        assert "teacher-0 died before" in (tmp_path / "out" / "logs" / "workers" / "teacher-0.log").read_text()
    assert_same_weights(undisturbed / "student", tmp_path / "out" / "student")


def test_an_unresponsive_teacher_is_named(configure, monkeypatch):
    from limbeck.launch import driver

    monkeypatch.setattr(driver, "_QUIET_SECONDS", 3)
    lines, stopped = [], []

    def log(line: str) -> None:
        lines.append(line)
        if "step 5/" in line:
            stopped.append(processes("TeacherWorker")[-1])
            os.kill(stopped[0], signal.SIGSTOP)
        elif "no response from teacher-0" in line:
            os.kill(stopped[0], signal.SIGCONT)

    result = run_on_ray(configure(**groups(2, 1), **LONG), log)
    assert result.step == LONG["max_steps"]
    assert any(
        "No step for 3 s: no response from teacher-0, which may be computing, or without" in line for line in lines
    )


def test_restarts_are_bounded_and_the_error_names_the_logs(configure, tmp_path):
    def log(line: str) -> None:
        if "step 2/" in line:
            os.kill(processes("StudentWorker")[0], signal.SIGKILL)

    with pytest.raises(LimbeckError, match="after 0 of 0 restarts; see the workers' logs"):
        run_on_ray(configure(**groups(1, 1), max_restarts=0), log)


SLOW_TEMPLATE = (
    "{% for i in range(3000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SLOW_SOURCE = """
import time
from pathlib import Path
from limbeck.registry import STEP_SOURCES
from limbeck.train.step_source import DatasetSource

@STEP_SOURCES.register("slow")
class SlowSource(DatasetSource):
    def __init__(self, *arguments):
        Path(__file__).with_suffix(".started").touch()
        time.sleep(12)
        super().__init__(*arguments)
"""


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory):
    """A plug-in with a step source that takes 12 s to load."""
    plugin = tmp_path_factory.mktemp("plugins") / "slow_source.py"
    plugin.write_text(SLOW_SOURCE)
    return plugin


@pytest.mark.parametrize("slow", ["tokenisation", "loading"])
def test_a_run_may_tokenise_and_load_for_longer_than_backend_timeout(configure, slow_source, slow):
    seconds = 6
    if slow == "tokenisation":
        changes = {"student.data_args.template": SLOW_TEMPLATE, "student.data_args.preprocessing_num_workers": 1}
    else:
        changes = {"plugins": [str(slow_source)], "step_source": "slow"}
    changes |= {"max_steps": 3, "save_steps": 0, "eval_steps": 0, "max_restarts": 0}
    begun = time.monotonic()
    result = run_on_ray(configure(**groups(2, 1), **changes, **{"student.backend_timeout": seconds / 60}))
    assert result.step == 3
    assert time.monotonic() - begun > 2 * seconds


def test_a_student_that_hangs_before_its_first_step_is_named(configure, slow_source):
    changes = {"plugins": [str(slow_source)], "step_source": "slow", "max_restarts": 0, "student.backend_timeout": 0.1}
    started = slow_source.with_suffix(".started")
    started.unlink(missing_ok=True)

    def stop() -> None:
        while not started.exists():
            time.sleep(0.1)
        os.kill(processes("StudentWorker")[-1], signal.SIGSTOP)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(LimbeckError, match=r"student-\d does not respond, after 0 of 0 restarts"):
        run_on_ray(configure(**groups(2, 1), **changes))


HUGE = {"model_type": "qwen2", "hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {
                "teacher_pretrain": None,
                "teacher.model_args.from_scratch": True,
                "teacher.model_args.model_config_kwargs": HUGE,
            },
            "the teacher None takes .* GB of memory to load",
        ),
        ({"teacher.system_envs": "other"}, "teacher-0 on .* runs transformers 99.0, and this process"),
    ],
    ids=["does-not-fit", "another-version"],
)
def test_a_mistake_in_a_worker_is_one_sentence_and_no_restart(configure, tmp_path, changes, sentence):
    if "teacher.system_envs" in changes:
        other = tmp_path / "transformers-99.0.dist-info"
        other.mkdir()
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 99.0\n")
        path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        changes = {"teacher.system_envs": {"PYTHONPATH": path}}
    lines = []
    with pytest.raises(LimbeckError, match=sentence):
        run_on_ray(configure(**groups(1, 1), **changes), lines.append)
    assert not any("goes on" in line for line in lines)
    deadline = time.monotonic() + 30
    while processes("StudentWorker") or processes("TeacherWorker"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_that_loses_a_machine_gives_the_weights_of_an_undisturbed_run(configure, settings, undisturbed, tmp_path):
    if not undisturbed.exists():
        run_on_ray(configure(**groups(2, 1), **LONG, output_dir=str(undisturbed)))
    config = tmp_path / "two.json"
    config.write_text(json.dumps(settings(**groups(2, 1), **LONG, num_nodes=2, num_gpus_per_node=2)))
    script = Path(__file__).with_name("two_nodes.py")
    done = subprocess.run([sys.executable, script, config], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a node was killed" in done.stdout
    assert_same_weights(undisturbed / "student", tmp_path / "out" / "student")


@pytest.fixture
def long_run(settings, tmp_path):
    """``long_run(**changes)`` starts ``limbeck train`` with a run that does not end."""
    started = []

    def start(**changes) -> subprocess.Popen:
        keys = settings(**groups(1, 1), max_steps=10_000, eval_steps=0, **{"save_steps": 0, **changes})
        keys["student"]["training_args"]["num_train_epochs"] = 10_000
        config = tmp_path / "long.yaml"
        config.write_text(yaml.safe_dump(keys))
        command = [sys.executable, "-m", "limbeck", "train", str(config)]
        started.append(
            subprocess.Popen(
                command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        return started[-1]

    yield start
    for train in started:
        if train.poll() is None:
            os.killpg(train.pid, signal.SIGKILL)
            train.communicate()


def assert_ended(but: set[int]) -> None:
    deadline = time.monotonic() + 30
    while set(processes("StudentWorker") + processes("TeacherWorker")) - but:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ctrl_c_saves_and_ends_every_process(long_run, tmp_path):
    mine = set(processes("StudentWorker"))
    train = long_run()
    lines = []
    for line in train.stdout:
        lines.append(line)
        if "step 3/" in line:
            break
    assert set(processes("StudentWorker")) - mine
    os.killpg(train.pid, signal.SIGINT)
    lines.append(train.communicate(timeout=90)[0])
    assert train.returncode == 130, "".join(lines)
    assert "Stopped by SIGINT" in lines[-1]
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()
    assert_ended(but=mine)


def test_a_signal_while_the_students_load_or_stop_ends_it_at_once(long_run, tmp_path):
    mine = set(processes("StudentWorker") + processes("TeacherWorker"))
    endless = tmp_path / "endless.jsonl"
    os.mkfifo(endless)
    train = long_run(**{"student.data_args.file_name": [str(endless)]})
    with endless.open("w"):  # opens when a student reads; it then waits for a row
        train.terminate()
        output = train.communicate(timeout=60)[0]
    assert train.returncode == 128 + signal.SIGTERM, output
    assert output.endswith("limbeck: stopped by SIGTERM before the first step; nothing was saved.\n")
    assert_ended(but=mine)

    train = long_run()
    output = ""
    for line in train.stdout:
        output += line
        if "step 5/" in line:
            (student,) = set(processes("StudentWorker")) - mine
            os.kill(student, signal.SIGSTOP)  # so that it is lost while it stops
            train.terminate()
            time.sleep(1)
            os.kill(student, signal.SIGKILL)
    train.wait(timeout=60)
    assert train.returncode == 128 + signal.SIGTERM, output
    assert (
        "limbeck: student-0 died (ActorDiedError), while the run was stopping after SIGTERM; see the workers' logs"
        in output
    )
    assert "(raylet)" not in output  # how Ray itself reports it
    assert_ended(but=mine)


def test_ctrl_c_during_the_start_or_before_a_restart_ends_it_at_once(long_run):
    mine = set(processes("StudentWorker") + processes("TeacherWorker"))
    train = long_run()
    for line in train.stdout:
        if line.startswith("Ray"):
            break
    while not (started := set(processes("TeacherWorker")) - mine) and train.poll() is None:
        time.sleep(0.02)
    for pid in started:
        os.kill(pid, signal.SIGSTOP)  # so that the start does not end before the signal arrives
    os.kill(train.pid, signal.SIGTERM)
    output = train.communicate(timeout=60)[0]
    assert train.returncode == 128 + signal.SIGTERM, output
    assert output.endswith("limbeck: stopped by SIGTERM before the first step; nothing was saved.\n")
    assert_ended(but=mine)

    train = long_run(save_steps=2)
    output = ""
    for line in train.stdout:
        output += line
        if "step 5/" in line:
            os.kill(*(set(processes("StudentWorker")) - mine), signal.SIGKILL)
        if "goes on from its last checkpoint in" in line:
            os.kill(train.pid, signal.SIGINT)
    train.wait(timeout=60)
    assert train.returncode == 130, output
    assert "limbeck: stopped by SIGINT before it went on; resume_from_checkpoint=true goes on" in output
    assert_ended(but=mine)
