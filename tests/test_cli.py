"""The command line: its commands, its error messages and the launcher script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import make_data, make_model

from limbeck import DistillPipeline, LimbeckError
from limbeck.cli import main
from limbeck.launch.local_ranks import visible_devices
from limbeck.version import VERSION

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    settings = {
        "student_pretrain": str(make_model(folder / "student")),
        "teacher_pretrain": str(make_model(folder / "teacher", hidden=48, seed=1)),
        "output_dir": str(folder / "out"),
        "sequence_length": 64,
        "max_steps": 2,
        "student": {"data_args": {"file_name": str(make_data(folder / "rows.jsonl"))}, "model_args": {"dtype": "fp32"}},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.processes
def test_help_imports_nothing_heavy():
    code = (
        "import sys, limbeck.cli\n"
        "try: limbeck.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'hydra', 'pydantic', 'rich', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"limbeck {VERSION}\n")


def test_train_then_report(run_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", str(run_file), f"output_dir={out}", "seed=3"]) == 0
    assert "student: " in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["config"]["seed"] == 3
    assert main(["report", str(out)]) == 0
    assert "<svg" in (out / "report.html").read_text()


def test_an_error_is_printed_to_stderr_with_status_two(run_file, capsys):
    assert main(["train", str(run_file), "student.training_args.learning_rat=1"]) == 2
    text = capsys.readouterr().err
    assert "student.training_args.learning_rat" in text
    assert "learning_rate" in text
    assert "Traceback" not in text


@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_output_to_a_full_disk_is_one_sentence():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "limbeck", "config", "--schema"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "limbeck: the output cannot be written: No space left on device.\n")


def test_data_show_prints_the_tokens_of_a_row(run_file, capsys):
    assert main(["data", "show", str(run_file), "--row", "3", "--ids", "student.data_args.default_system=Brief"]) == 0
    text = capsys.readouterr().out
    assert "rows.jsonl:4 (question/answer), weight 1" in text
    assert "prompt    ‹<|system|>›:" in text
    assert "reads the same tokens" in text
    assert main(["data", "show", str(run_file), "cross_tokenizer=hybrid"]) == 0
    assert "learned tokens are aligned with" in capsys.readouterr().out
    assert main(["data", "show", str(run_file), "--row", "3000"]) == 2
    assert "--row 3000 does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "show", str(run_file), "--rwo", "3"])


def test_training_reads_what_data_cache_writes(run_file, tmp_path, capsys):
    place = f"student.data_args.cache_path={tmp_path / 'tokens'}"
    assert main(["data", "cache", str(run_file), place]) == 0
    text = capsys.readouterr().out
    assert "training: 96 rows" in text
    assert f"cache: {tmp_path / 'tokens'}" in text
    before = sorted((tmp_path / "tokens").rglob("*"))
    assert main(["train", str(run_file), place, f"output_dir={tmp_path / 'out'}"]) == 0
    assert before and sorted((tmp_path / "tokens").rglob("*")) == before


def test_data_commands_read_sources_and_formats(run_file, tmp_path, capsys):
    rows, chat = tmp_path / "rows.jsonl", tmp_path / "chat.jsonl"
    rows.write_text('{"frage": "two?", "antwort": "three"}\n')
    chat.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    words = [
        "~student.data_args.file_name",
        f"+student.data_args.sources=[{{path: {rows}, weight: 1, domain: sums}}, {{path: {chat}, weight: 3}}]",
        "question_key=frage", "answer_key=antwort", f"student.data_args.cache_path={tmp_path / 'tokens'}",
    ]  # fmt: skip
    assert main(["data", "show", str(run_file), *words]) == 0
    assert f"{rows}:1 (frage/antwort), weight 1, domain sums" in capsys.readouterr().out
    assert main(["data", "show", str(run_file), "--row", "1", *words]) == 0
    assert f"{chat}:1 (messages), weight 1\n" in capsys.readouterr().out
    assert main(["data", "show", str(run_file), "--file", str(chat), *words]) == 0
    assert f"{chat}:1 (messages)" in capsys.readouterr().out
    # Two rows are less than one step, which is no reason not to tokenise them.
    assert main(["data", "cache", str(run_file), f"validation.data_args.file_name={chat}", *words]) == 0
    text = capsys.readouterr().out
    assert "training: 2 rows" in text
    assert "validation: 1 rows" in text


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [("{t_start: 2}", "taid needs 0 <= t_start <= t_end <= 1, got 2.0"), ("{t_start: x}", "must be numbers for taid")],
)
def test_config_checks_the_parameters_of_the_divergence(run_file, capsys, kwargs, sentence):
    assert main(["config", str(run_file), "kd_objective=taid", f"kd_objective_kwargs={kwargs}"]) == 2
    assert sentence in capsys.readouterr().err


def test_config_prints_the_whole_configuration(run_file, capsys):
    assert main(["config", str(run_file), "kd_temperature=2"]) == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert values["kd_temperature"] == 2
    assert values["max_steps"] == 2
    assert "command line" in text
    assert main(["config", "--schema"]) == 0
    assert "student.training_args.learning_rate" in capsys.readouterr().out


def test_config_prints_the_dialect(run_file, capsys):
    assert main(["config", str(run_file)]) == 0
    assert capsys.readouterr().out.startswith("# dialect: limbeck\n")
    assert main(["config", str(run_file), "rpc_timeout=60"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("# dialect: roll\n")
    assert "note: These settings of ROLL have no effect in Limbeck: rpc_timeout (command line)." in printed.err


@pytest.mark.parametrize(
    "command",
    [["train"], ["config"], ["plan"], ["data", "show"], ["data", "cache"], ["check"], ["serve-teacher"]],
)
def test_every_command_with_a_configuration_takes_a_dialect(run_file, capsys, command):
    assert main([*command, "--dialect", "rol", str(run_file), "seed=3"]) == 2
    assert (
        capsys.readouterr().err
        == "limbeck: dialect rol is not known; use one of distillkit, hyperpod, limbeck, megatron, nemo_rl, roll.\n"
    )
    assert main([*command, str(run_file), "--dialect", "limbeck", "rpc_timeout=60"]) == 2
    assert "command line: rpc_timeout is not a key" in capsys.readouterr().err


def test_processes_started_for_several_devices_use_the_same_dialect(run_file, monkeypatch):
    started = []
    monkeypatch.setattr("limbeck.launch.start.run_ranks", lambda ranks, command: started.append((ranks, command)) or 0)
    devices = "student.device_mapping=[0,1]"
    assert main(["train", str(run_file), devices, "--dialect", "roll"]) == 0
    ((ranks, command),) = started
    assert ranks == 2
    assert command[-3:] == ["--dialect", "roll", devices]


@pytest.mark.processes
def test_the_launcher_script_trains_like_the_command(run_file, tmp_path):
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "examples" / "start_distill_pipeline.py"), "--config_path", run_file.parent.name,
            "--config_name", "run", f"output_dir={tmp_path / 'out'}",
        ],
        capture_output=True, text=True, cwd=run_file.parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("devices", "allowed", "visible"),
    [([3], None, "3"), ([0, 1], "4,5,6,7", "4,5"), ([2], "GPU-a,GPU-b,GPU-c", "GPU-c")],
)
def test_devices_are_counted_within_cuda_visible_devices(devices, allowed, visible):
    assert visible_devices(devices, allowed) == visible


def test_a_device_outside_cuda_visible_devices_is_an_error():
    with pytest.raises(LimbeckError, match="leaves only 2"):
        visible_devices([2], "0,1")


@pytest.mark.slow
def test_the_demo_runs_and_refuses_a_folder_with_other_files(tmp_path, monkeypatch, capsys):
    import limbeck.demo.run as demo

    small = demo.Sizes(
        teacher_problems=200, student_problems=64, held_out=16, teacher_steps=3, student_steps=3, further_steps=2,
        teacher=(1, 32), student=(1, 32), packs_per_step=2,
    )  # fmt: skip
    monkeypatch.setattr(demo, "Sizes", lambda: small)
    for _ in range(2):  # a second demo replaces the first
        assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    for words in ("Teacher", "Cross-entropy", "Distilled", "then off-policy", "then on-policy", "report.html"):
        assert words in shown
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Distilled" in page
    assert "in two ways, each for 2 further steps" in page
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert main(["demo", "--output", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_notices_wait_until_everything_is_loaded(settings, configure, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(js_beta=0.25, teacher_pretrain=str(tmp_path / "nowhere"))))
    assert main(["train", str(config)]) == 2
    printed = capsys.readouterr().err
    assert "nowhere" in printed
    assert "note:" not in printed
    DistillPipeline(configure(max_steps=1, eval_steps=0), notices=["js_beta has no effect."]).run()
    assert "note: js_beta has no effect.\n" in capsys.readouterr().err
