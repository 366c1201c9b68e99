"""Tests and short measurements of a checkout on a machine with a GPU: ``make gpu``.

    make gpu PYTHON=python3
    python benchmarks/gpu.py --json gpu.json

Runs the tests marked ``gpu``, and ``step_gpu.py``, ``loss_gpu.py``, ``rollout.py`` and ``on_policy_step.py`` with ``--quick``,
each with a time limit, in at most eight minutes, and says which of the goals in ``goals.py`` are kept. A part that fails leaves
the others standing. It uses the Python that runs it, this checkout's ``src``, and what is installed; nothing is installed or
downloaded. Exit status: 0, 1 if a part failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import goals
from side import write_json

ROOT = Path(__file__).resolve().parents[1]
TESTS, STEP, LOSS, WRITE, ON_POLICY = "tests", "step", "loss", "write", "on_policy"


def parts(folder: Path) -> list[tuple[str, int, list[str]]]:
    """(name, seconds allowed, arguments of Python) of each part."""
    marked = (
        str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    )
    # Other test files would only be collected, some of which need libraries that a GPU machine may lack.
    options = ["-v", "-m", "gpu", "--durations", "10", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if find_spec("pytest_timeout") is not None:
        options += ["--timeout", "60"]
    if find_spec("xdist") is not None:  # most of their time is compilation, which takes one core each
        options += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))]
    return [
        (TESTS, 130, ["-m", "pytest", *options, *sorted(marked)]),
        (STEP, 180, ["benchmarks/step_gpu.py", "--quick", "--json", str(folder / f"{STEP}.json")]),
        (LOSS, 50, ["benchmarks/loss_gpu.py", "--quick", "--json", str(folder / f"{LOSS}.json")]),
        (WRITE, 55, ["benchmarks/rollout.py", "--quick", "--json", str(folder / f"{WRITE}.json")]),
        (ON_POLICY, 60, ["benchmarks/on_policy_step.py", "--quick", "--json", str(folder / f"{ON_POLICY}.json")]),
    ]


def run(name: str, limit: int, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run one part and show its output. Returns its status, its seconds, and its last line or what it measured."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if name == TESTS:
        environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    log, measured = folder / f"{name}.log", folder / f"{name}.json"
    print(f"== {name}, at most {limit} s", flush=True)
    begun = time.monotonic()
    with log.open("w") as output:
        # In a session of its own, so that the processes it has started can be ended with it.
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
            status = "ok" if code == 0 else f"failed, exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = log.read_text(errors="replace")
    print(text, flush=True)
    lines = [line for line in text.splitlines() if line.strip()]
    found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - begun, 1)}
    if measured.exists():
        try:
            return found | json.loads(measured.read_text())
        except ValueError as error:
            found["status"] = f"failed, {measured.name} is not JSON: {error}"
    return found | {"last_line": lines[-1].strip("= ") if lines else ""}


def rows(name: str, found: dict[str, Any]) -> list[str]:
    """One line for the part, and one for each of its measurements."""
    lines = [f"{name:9} {found['status']:24} {found['seconds']:6.1f} s  {found.get('last_line', '')}"]
    for result in found.get("results", []):
        if name == STEP and "seconds" in result:
            share = f"{result['matmul_share']:.1%}" if "matmul_share" in result else "-"
            lines.append(
                f"       {result['shape']} {result['rows']} {result['side']}: {result['seconds']:.4f} s/step, "
                f"{result['tokens_per_second']:.0f} tokens/s, {share} of the matmul peak"
                + (f", peak {result['peak_gb']:.1f} GB" if result.get("peak_gb") else "")
            )
        elif name == STEP:
            lines.append(f"       {result['shape']} {result['rows']} {result['side']}: {result['status']}")
        elif name == WRITE:
            lines.append(
                f"       {result['side']}: {result['tokens_per_second']:.0f} tokens/s; limbeck is "
                f"{result['times_as_fast_is_limbeck']:.2f} x as fast"
            )
        elif name == ON_POLICY:
            lines.append(
                f"       {result['side']}: {result['seconds']:.2f} s for {result['written']:.0f} written tokens; limbeck is "
                f"{result['times_as_fast_is_limbeck']:.2f} x as fast"
            )
        elif "of_products" in result:
            lines.append(
                f"       vocabulary {result['vocab']}, {result['what']}: {result['ms']:.2f} ms, "
                f"{result['of_products']:.2f} x products, {result['of_aligned_products_per_logit']:.2f} x aligned products "
                f"per logit, growth {result['growth_gb']:.2f} GB"
            )
    return lines + goals.lines(found.get("goals", []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=Path("gpu.json"), help="the file of all results; gpu.json by default"
    )
    every = (TESTS, STEP, LOSS, WRITE, ON_POLICY)
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a machine with a CUDA device, and PyTorch finds none here.", file=sys.stderr)
        sys.exit(2)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "parts": {}}
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, limit, arguments in parts(Path(temporary)):
            if name not in args.only:
                continue
            found = report["parts"][name] = run(name, limit, arguments, Path(temporary))
            table += rows(name, found)
            write_json(args.json, report)  # what is there stands if this process is ended
    print(f"\n{report['device']}, torch {report['torch']}", *table, f"written to {args.json}", sep="\n")
    sys.exit(any(found["status"] != "ok" for found in report["parts"].values()))


if __name__ == "__main__":
    main()
