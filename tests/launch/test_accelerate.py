"""``accelerate launch``: its settings, the number of processes, and real runs over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from runs import assert_same_weights, metric_by_step

from limbeck import DistillPipeline, LimbeckError
from limbeck.config import load_arguments, load_config
from limbeck.launch import accelerate
from limbeck.launch.accelerate import check_world_size, launcher_settings, requested_processes

SCRIPT = Path(__file__).parents[2] / "examples" / "distil_logits_cli.py"
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
DEEPSPEED = {**LAUNCHED, "ACCELERATE_USE_DEEPSPEED": "true"}


def loaded(environment, *argv):
    return load_arguments(argv, "hyperpod", launcher=launcher_settings(environment))


def test_without_the_launcher_nothing_is_set():
    assert launcher_settings({"WORLD_SIZE": "2"}) == []
    assert launcher_settings(LAUNCHED) == []


def test_deepspeed_flags_become_the_students_strategy():
    flags = {"DEEPSPEED_ZERO_STAGE": "3", "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme", "GRADIENT_CLIPPING": "0.5",
             "DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/local",
             "GRADIENT_ACCUMULATION_STEPS": "8", "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}  # fmt: skip
    found = loaded({**DEEPSPEED, **{f"ACCELERATE_{name}": value for name, value in flags.items()}})
    strategy = found.config.student.strategy_args
    assert strategy.strategy_name == "deepspeed_train"
    offload = {"device": "nvme", "nvme_path": "/local"}
    assert strategy.strategy_config.deepspeed == {"zero_optimization": {"stage": 3, "offload_param": offload}}
    assert found.config.max_grad_norm == 0.5
    assert found.origins["max_grad_norm"] == "accelerate launch --gradient_clipping"
    assert found.origins["student.strategy_args.strategy_name"] == "accelerate launch --use_deepspeed"


def test_the_default_stage_gives_way_to_that_of_the_configuration(tmp_path):
    def stage(environment, *argv):
        return loaded(environment, *argv).config.student.strategy_args.strategy_config.deepspeed["zero_optimization"][
            "stage"
        ]

    own = "student.strategy_args.strategy_config={zero_optimization: {stage: 1}}"
    assert stage(DEEPSPEED) == 2
    assert stage(DEEPSPEED, own) == 1
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}))
    assert stage({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}) == 3
    with pytest.raises(LimbeckError, match=r"accelerate launch --zero_stage = 2 contradicts .*stage = 1; keep one"):
        stage({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, own)


def test_the_precision_is_that_of_the_launcher_unless_a_flag_contradicts_it(tmp_path):
    assert loaded({"ACCELERATE_MIXED_PRECISION": "fp16"}).config.teacher.model_args.dtype == "fp16"
    assert loaded(LAUNCHED).config.student.model_args.dtype == "bf16"
    with pytest.raises(LimbeckError, match="accelerate launch --mixed_precision = bf16 contradicts --fp16 = fp16"):
        loaded({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--fp16")
    file = tmp_path / "run.yaml"  # another spelling of the same precision is no contradiction
    file.write_text("student_pretrain: s\nstudent: {model_args: {dtype: bfloat16}, data_args: {file_name: d}}\n")
    settings = launcher_settings({"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert load_config(file, ["teacher_pretrain=t"], launcher=settings).config.student.model_args.dtype == "bf16"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm is not read"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "--use_parallelism_config is not read"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "--mixed_precision fp8 is not supported"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"}, "--deepspeed_config_file /nowhere.json cannot be read"),
    ],
)
def test_what_is_configured_otherwise_here_is_refused(environment, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        launcher_settings({**DEEPSPEED, **environment})


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("python /bin/accelerate launch --num_processes=16 --num_machines=2 a.py --num_processes 3", 16),
        ("python -m accelerate.commands.launch --num-processes 4 a.py", 4),
        ("accelerate-launch --use_deepspeed --num_processes 2 -m limbeck train --config_file x.yaml", 2),
        ("python /bin/accelerate launch --config_file FILE a.py --config_file other.yaml", 6),
        ("python /bin/accelerate launch a.py --num_processes 3", None),
        ("python /bin/accelerate config", None),
        ("torchrun --nproc-per-node 2 a.py", None),
        ("bash", None),
    ],
)
def test_the_number_of_processes_is_read_from_the_command(command, processes, tmp_path):
    (tmp_path / "accelerate.yaml").write_text("num_processes: 6\nnum_machines: 2\n")
    assert requested_processes(command.replace("FILE", str(tmp_path / "accelerate.yaml")).split()) == processes


def test_the_number_of_processes_may_be_in_the_launchers_default_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("num_processes: 6\n")
    assert requested_processes(["accelerate", "launch", "train.py"]) == 6
    assert requested_processes(["accelerate", "launch", "--num_processes", "2", "train.py"]) == 2


def test_another_number_of_processes_than_requested_is_an_error(monkeypatch):
    monkeypatch.setattr(accelerate, "_ancestors", lambda: [["sh"], ["accelerate", "launch", "--num_processes", "16"]])
    check_world_size({**LAUNCHED, "WORLD_SIZE": "16"})
    check_world_size({"WORLD_SIZE": "2"})
    for environment in ({"WORLD_SIZE": "8"}, {}):
        with pytest.raises(LimbeckError, match="was to start 16 processes, but this run has"):
            check_world_size({**LAUNCHED, **environment})
    monkeypatch.setattr(accelerate, "_ancestors", list)
    check_world_size(LAUNCHED)
    with pytest.raises(LimbeckError, match="was to start several processes, but this run has 1"):
        check_world_size({**LAUNCHED, "MASTER_ADDR": "127.0.0.1"})


def test_the_command_of_process_1_is_looked_at():
    """In a container the launcher may be that process."""
    assert list(accelerate._ancestors())[-1] == Path("/proc/1/cmdline").read_bytes().decode().split("\0")


def run(command, environment):
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


RUN_AND_RESUME = str(Path(__file__).with_name("run_and_resume.py"))


@pytest.fixture(scope="module")
def arguments(assets, tmp_path_factory):
    """Four steps of the script on rows in ShareGPT's format, saved every two, without the batch size and the output folder."""
    rows = tmp_path_factory.mktemp("sharegpt") / "rows.jsonl"
    turns = [
        [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": row["answer"]}] for row in tiny.rows()
    ]
    rows.write_text("".join(json.dumps({"conversations": one}) + "\n" for one in turns))
    return [
        "--teacher_model", str(assets / "teacher"), "--student_model", str(assets / "student"),
        "--dataset_name", str(rows), "--max_length", "192", "--no-bf16", "--save_steps", "2",
        "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3", "max_steps=4", "track_with=none",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    argv = [*arguments, "--per_device_train_batch_size", "4", "--output_dir", str(folder)]
    DistillPipeline(load_arguments(argv, "hyperpod").config).run()
    return folder


def two_machines():
    """The launchers of two machines. With c10d, which of two on one machine opens the port would be a matter of luck."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        ["-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=2", f"--machine_rank={rank}",
         "--main_process_ip=127.0.0.1", f"--main_process_port={port}", "--mixed_precision=no", "--dynamo_backend=no",
         "--use_deepspeed", "--deepspeed_multinode_launcher=standard"]
        for rank in range(2)
    ]  # fmt: skip


def torchrun():
    return [["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]]


@pytest.mark.processes
@pytest.mark.workers
@pytest.mark.parametrize(
    ("launchers", "strategy"),
    [
        pytest.param(
            two_machines, "deepspeed_train", id="accelerate",
            marks=pytest.mark.skipif(
                any(importlib.util.find_spec(name) is None for name in ("accelerate", "deepspeed")),
                reason="needs both packages",
            ),
        ),
        pytest.param(torchrun, None, id="torchrun"),
    ],
)  # fmt: skip
def test_two_processes_give_the_run_of_one_and_resume_exactly(arguments, alone, tmp_path, launchers, strategy):
    """ZeRO-2 under accelerate, and the strategy that a run has by default under torchrun."""
    out, first = tmp_path / "out", tmp_path / "out-first"
    script = [RUN_AND_RESUME, *arguments, "--per_device_train_batch_size", "2", "--output_dir", str(out)]
    started = [run([*launcher, *script], {**os.environ, "DS_ACCELERATOR": "cpu"}) for launcher in launchers()]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), outputs
    assert "checkpoint-2 at step 2." in " ".join(outputs[0].split())
    state = json.loads((first / "run.json").read_text())
    assert state["ranks"] == 2
    worker = state["config"]["student"]["strategy_args"]
    assert worker["strategy_name"] == strategy
    if strategy == "deepspeed_train":
        assert worker["strategy_config"]["deepspeed"]["zero_optimization"] == {"stage": 2}
    losses = metric_by_step(first, "train/loss")
    assert losses == pytest.approx(metric_by_step(alone, "train/loss"), abs=1e-4)
    assert_same_weights(first / "student", alone / "student", tolerance=1e-4)
    assert metric_by_step(out, "train/loss") == losses
    assert_same_weights(first / "student", out / "student")


@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_a_launcher_that_starts_one_process_silently_is_stopped(tmp_path):
    command = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=2",
        str(SCRIPT),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    process = run(command, {**os.environ})
    assert "accelerate launch was to start 2 processes, but this run has 1" in process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert not (tmp_path / "o").exists()
