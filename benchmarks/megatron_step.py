"""Compares training steps of ``megatron_train`` with those of ModelOpt's distillation plugin, and with their parts.

    python benchmarks/megatron_step.py                    # one process, then two tensor-parallel ones
    python benchmarks/megatron_step.py --ranks 2 --rounds 20

It needs ``pip install -e '.[megatron]' nvidia-modelopt==0.47.0 requests``, and no GPU: megatron-core's CUDA calls are replaced
as in the tests (tests/strategies/megatron_on_cpu.py), and ranks communicate over gloo. It says nothing about GPUs.

Each side runs in processes of its own, and the sides alternate step by step, so that other load on the machine affects all
of them: ``DistillPipeline``; ModelOpt's ``DistillationModel`` with Megatron's schedule and optimizer; and Megatron alone, whose
step of the student on the labels and forward pass of the teacher are the parts. All sides have the same models, batches,
attention and norms, and every position is supervised. Memory is the growth of the peak of all processes of a side over their
memory before the first step. At the end of each comparison it says which of the goals in ``goals.py`` are kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import goals
from side import Side
from step import ROWS, TIME, VOCAB, prepare


def compare(ranks: int, dtype: str, rounds: int, warmup: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        start = (sys.executable, folder, dtype, rounds + warmup, "megatron_step_sides.py", str(ranks))
        ours, theirs, parts = (Side(name, *start) for name in ("limbeck", "modelopt", "megatron"))
        seconds: dict[str, list[float]] = {name: [] for name in ("limbeck", "modelopt", "student", "teacher")}
        for number in range(rounds + warmup):
            now = {
                "limbeck": ours.request(),
                "modelopt": theirs.request(),
                "student": parts.request("student"),
                "teacher": parts.request("teacher"),
            }
            for name, answer in now.items() if number >= warmup else ():
                seconds[name].append(answer["seconds"])
        growth = {side.name: side.request("memory")["growth_mb"] for side in (ours, theirs)}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    both = statistics.median(map(sum, zip(seconds["student"], seconds["teacher"], strict=True)))
    print(
        f"\n{ranks} tensor-parallel rank(s), {dtype}: {ROWS} × {TIME} tokens, vocabulary {VOCAB}, median of {rounds} steps"
    )
    for name in ("limbeck", "modelopt"):
        print(
            f"  {name:8} {middle[name] * 1e3:6.0f} ms per step   {growth[name]:6.0f} MB growth of peak memory   "
            f"{middle[name] / both:.2f} × the parts"
        )
    print(
        f"  parts    {both * 1e3:6.0f} ms: student {middle['student'] * 1e3:.0f}, teacher {middle['teacher'] * 1e3:.0f}"
    )
    compared = (
        (goals.MEGATRON_PARTS, middle["limbeck"] / both),
        (goals.MEGATRON_SPEED, middle["modelopt"] / middle["limbeck"]),
        (goals.MEGATRON_MEMORY, growth["limbeck"] / growth["modelopt"]),
    )
    print(*goals.lines([goals.compare(goal, value, f"{ranks} rank(s), {dtype}") for goal, value in compared]), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=(1, 2), action="append")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    for ranks in args.ranks or (1, 2):
        compare(ranks, args.dtype, args.rounds, args.warmup)


if __name__ == "__main__":
    main()
