"""Benchmarks: all can be imported, and those of a GPU run from end to end, on tiny models and a CPU."""

import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_finds_what_it_imports(script, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module(script)


@pytest.mark.processes
def test_the_benchmark_of_steps_measures_each_side_that_is_installed(tmp_path):
    options = [
        "--tiny",
        "--device",
        "cpu",
        "--folder",
        str(tmp_path),
        "--json",
        str(tmp_path / "result.json"),
        "--profile",
    ]
    sides = ["--sides", "products", "limbeck", "liger", "--set", "kd_objective=reverse_kl", "compile_loss=false"]
    command = [sys.executable, str(BENCHMARKS / "step_gpu.py"), *options, *sides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    found = {(result["side"], result["rows"]): result for result in results}
    assert found["products", "full"]["matmul_share"] > 0
    if find_spec("trl") is None and find_spec("liger_kernel") is None:
        assert found["liger", "full"]["status"] == "not installed: trl, liger_kernel"
    for rows, fewest in (("full", 1024), ("packed", 768)):
        ours = found["limbeck", rows]
        assert (ours["status"], ours["steps"]) == ("ok", 6)
        assert fewest <= round(ours["tokens_per_second"] * ours["seconds"]) <= 1024
        assert "aten::mm" in (Path(ours["out"]) / "profile.txt").read_text()
        assert json.loads((Path(ours["out"]) / "run.json").read_text())["config"]["kd_objective"] == "reverse_kl"


@pytest.mark.processes
def test_a_side_that_fails_is_reported_and_leaves_the_others_standing(tmp_path):
    options = ["--tiny", "--device", "cpu", "--rows", "full", "--json", str(tmp_path / "result.json")]
    sides = ["--sides", "products", "limbeck", "--set", "kd_objective=no_such_objective"]
    command = [sys.executable, str(BENCHMARKS / "step_gpu.py"), *options, *sides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    products, ours = json.loads((tmp_path / "result.json").read_text())["results"]
    assert products["status"] == "ok"
    assert ours["status"].startswith("failed: ")
    assert "no_such_objective" in ours["status"]


HANGS = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
measured = {"side": "limbeck", "shape": "s", "rows": "full", "status": "ok", "seconds": 0.5, "tokens_per_second": 7.0}
Path(sys.argv[1]).write_text(repr({"results": [measured], "child": child.pid}).replace("'", '"'))
time.sleep(60)
"""


@pytest.mark.processes
def test_a_part_of_make_gpu_that_fails_or_hangs_leaves_the_others_standing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    finds_package = "import limbeck.errors, pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{}')"

    def parts(folder):
        return [
            (gpu.TESTS, 60, ["-c", "import sys; print('== 1 failed =='); sys.exit(3)"]),
            (gpu.STEP, 2, ["-c", HANGS, str(folder / f"{gpu.STEP}.json")]),
            (gpu.LOSS, 60, ["-c", finds_package, str(folder / f"{gpu.LOSS}.json")]),
            (gpu.WRITE, 60, ["-c", "import sys; open(sys.argv[1], 'w').write('{')", str(folder / f"{gpu.WRITE}.json")]),
        ]

    monkeypatch.setattr(gpu, "parts", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    statuses = {name: part["status"] for name, part in found.items()}
    assert statuses.pop("write").startswith("failed, write.json is not JSON")
    assert statuses == {"tests": "failed, exit status 3", "step": "stopped after 2 s", "loss": "ok"}
    table = capsys.readouterr().out.split("a GPU, torch")[1]
    assert "1 failed" in table
    assert "s full limbeck: 0.5000 s/step, 7 tokens/s" in table  # what was measured before the limit
    with pytest.raises(ProcessLookupError):  # the processes that a part has started end with it
        for _ in range(200):
            os.kill(found["step"]["child"], 0)
            time.sleep(0.02)


def test_goals_are_compared_where_their_sides_were_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    goals = importlib.import_module("goals")
    common = {"shape": goals.SMALL, "rows": "full", "seconds": 2.0, "peak_gb": 20.0, "first_step_seconds": 30.0}
    ours = {**common, "side": "limbeck", "tokens_per_second": 300.0}
    packed = {**ours, "rows": "packed", "tokens_per_second": 260.0}
    products = {**common, "side": "products", "seconds": 1.5}
    liger = {**common, "side": "liger", "tokens_per_second": 100.0, "peak_gb": 40.0}
    failed = {"shape": goals.SMALL, "rows": "full", "side": "trl", "status": "out of memory"}
    compared = goals.step_goals([products, ours, failed, liger, packed])
    assert {each["goal"]: (round(each["value"], 2), each["kept"]) for each in compared} == {
        goals.SPEED_LIGER.what: (3.0, True),
        goals.MEMORY_LIGER.what: (0.5, False),
        goals.STEP.what: (1.33, True),
        goals.PACKED.what: (0.87, False),
        goals.COLD.what: (30.0, True),
        goals.KEPT_CACHE.what: (30.0, False),
    }
    size = {"hidden_student": 896, "hidden_teacher": 1536, "vocab": 151_665, "what": "limbeck forward_kl"}
    loss = {**size, "of_products": 0.25, "of_aligned_products_per_logit": 1.16, "growth_gb": 1.02}
    compared = goals.loss_goals([{**size, "what": "products"}, loss])
    assert [each["kept"] for each in compared] == [False, True]
    assert goals.lines(compared)[0].endswith("1.16, goal ≤ 1.12, kept: NO")


def test_the_parts_of_make_gpu_take_at_most_eight_minutes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu, step_gpu = importlib.import_module("gpu"), importlib.import_module("step_gpu")
    limits = {name: limit for name, limit, _ in gpu.parts(tmp_path)}
    assert sum(limits.values()) <= 8 * 60
    assert limits[gpu.STEP] > step_gpu.QUICK_SECONDS


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forks")
def test_a_killed_run_resumes_to_the_weights_of_an_undisturbed_run(tmp_path):
    counts = ["--one", "10", "--two", "2", "--ray", "0", "--json", str(tmp_path / "result.json")]
    command = [sys.executable, str(BENCHMARKS / "kill.py"), *counts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = json.loads((tmp_path / "result.json").read_text())
    assert (one["kills"], two["kills"]) == (10, 2)
    assert all(one[moment] > 0 for moment in ("while loading", "between saves", "inside a save"))
    assert one["other final weights"] == two["other final weights"] == 0


@pytest.mark.processes
def test_the_benchmark_of_writing_compares_both_sides_and_gpu_shows_them(tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    sizes = ["--prompts", "4", "--max-tokens", "8", "--slots", "4"]
    command = [
        sys.executable,
        str(BENCHMARKS / "rollout.py"),
        "--quick",
        "--device",
        "cpu",
        *sizes,
        "--json",
        str(result),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text())
    assert [one["side"] for one in found["results"]][:2] == ["limbeck", "model.generate"]
    assert found["equal_greedy_completions"]["model.generate"] == 4
    assert "greedy completions equal to those of model.generate: 4 of 4" in done.stdout
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    lines = gpu.rows(gpu.WRITE, {"status": "ok", "seconds": 1.0, **found})
    assert "limbeck: " in lines[1] and "limbeck is 1.00 x as fast" in lines[1]


@pytest.mark.processes
def test_the_benchmark_of_on_policy_steps_measures_without_trl_and_gpu_shows_it(tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    options = ["--quick", "--device", "cpu", "--prompts", "8", "--max-tokens", "4", "--json", str(result)]
    command = [sys.executable, str(BENCHMARKS / "on_policy_step.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text())
    ours = found["results"][0]
    assert (found["device"], found["dtype"], ours["side"]) == ("cpu", "fp32", "limbeck")
    assert 8 <= ours["written"] <= 32 and ours["writing"] + ours["teacher"] + ours["student"] < ours["seconds"]
    assert (len(found["results"]) == 1) == ("only limbeck was measured" in done.stdout) == (find_spec("trl") is None)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    lines = gpu.rows(gpu.ON_POLICY, {"status": "ok", "seconds": 1.0, **found})
    assert " written tokens; limbeck is 1.00 x as fast" in lines[1]


class Here:
    """Stands in for a pool of processes; runs what is submitted at once."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.mark.slow
def test_the_benchmark_of_what_a_share_does_prints_every_setting(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    on_policy = importlib.import_module("on_policy")

    @dataclass(frozen=True)
    class Small(on_policy.Sizes):
        teacher_problems: int = 200
        student_problems: int = 64
        held_out: int = 8
        teacher: tuple[int, int] = (1, 32)
        student: tuple[int, int] = (1, 32)
        teacher_steps: int = 2
        student_steps: int = 2
        packs_per_step: int = 1

    monkeypatch.setattr(on_policy, "Sizes", Small)
    monkeypatch.setattr(on_policy, "SETTINGS", on_policy.SETTINGS[-1:])
    monkeypatch.setattr(on_policy, "STALE", on_policy.STALE[:1])
    monkeypatch.setattr(on_policy, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(sys, "argv", ["on_policy.py", "--seeds", "1", "--steps", "2"])
    on_policy.main()
    lines = capsys.readouterr().out.split("mean ± standard deviation")[1].strip().splitlines()
    assert [line.split("exact match")[0].strip() for line in lines] == [
        "before",
        "reverse_kl λ=1 staleness 0",
        "forward_kl λ=1 staleness 1",
    ]
    assert all("val/ce" in line and "± 0.000" in line for line in lines)
    assert "tokens" in lines[1] and "tokens 0 " not in lines[1]
