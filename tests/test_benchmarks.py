"""Benchmarks: all can be imported, and those of a GPU run from end to end, on tiny models and a CPU."""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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
