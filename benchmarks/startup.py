"""Start-up time: seconds until ``limbeck --help`` has printed, and until the end of the first training step.

    python benchmarks/startup.py

The models have the demo's size. The data is tokenised already: the first run fills the cache and is not counted.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from limbeck.demo.problems import generate, write_jsonl
from limbeck.demo.training import Sizes, make_model, make_tokenizer

LIMBECK = [sys.executable, "-m", "limbeck"]


def seconds_of(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def seconds_to_first_step(config: Path, metrics: Path) -> float:
    shutil.rmtree(metrics.parent, ignore_errors=True)
    begun = time.time()
    subprocess.run([*LIMBECK, "train", str(config)], check=True, capture_output=True)
    return json.loads(metrics.read_text().splitlines()[0])["time"] - begun


def make_run(folder: Path) -> dict[str, Any]:
    """Create models of the demo's size and its data in ``folder``; returns the settings of a run of one step."""
    sizes = Sizes()
    write_jsonl(generate(sizes.student_problems, 1), folder / "teacher.jsonl")
    tokenizer = make_tokenizer(folder, sizes.vocab_size)
    make_model(folder / "teacher", tokenizer, sizes.teacher, 1)
    make_model(folder / "student", tokenizer, sizes.student, 0)
    return {
        "student_pretrain": str(folder / "student"),
        "teacher_pretrain": str(folder / "teacher"),
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "sequence_length": 128,
        "student": {"data_args": {"file_name": str(folder / "teacher.jsonl"), "cache_path": str(folder / "cache")}},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(make_run(folder)))
        seconds_to_first_step(config, folder / "out" / "metrics.jsonl")
        first = [seconds_to_first_step(config, folder / "out" / "metrics.jsonl") for _ in range(5)]
        help_seconds = [seconds_of([*LIMBECK, "--help"]) for _ in range(5)]
    print(f"limbeck --help: {statistics.median(help_seconds):.2f} s (worst of 5: {max(help_seconds):.2f} s)")
    print(
        f"limbeck train to the end of the first step: {statistics.median(first):.2f} s (worst of 5: {max(first):.2f} s)"
    )


if __name__ == "__main__":
    main()
