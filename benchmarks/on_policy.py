"""What a share of on-policy samples does for a student: λ = 0, 0.5 and 1, forward and reverse KL, and staleness.

    python benchmarks/on_policy.py                       # three seeds; about 20 minutes on two cores
    python benchmarks/on_policy.py --seeds 1 --steps 50

Every core runs one seed at a time, in one thread. For each seed, the teacher and the distilled student of ``limbeck demo`` are
trained; then the student goes on for the same number of steps under each setting. All settings have the same prompts and the
same number of samples per step. The student writes the share λ of the answers; the others are those of the data, of which 30 %
are wrong. The figures are means over the seeds with the standard deviation after ±.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from limbeck.demo.problems import Problem
from limbeck.demo.training import (
    Sizes,
    Trained,
    exact_match,
    go_on,
    make_data,
    make_model,
    make_tokenizer,
    train,
    write_answers,
)  # fmt: skip
from limbeck.models.logs import configure_logging

SETTINGS = [(objective, share, 0) for objective in ("forward_kl", "reverse_kl") for share in (0.0, 0.5, 1.0)]
STALE = [("forward_kl", 1.0, staleness) for staleness in (1, 2)]
Setting = tuple[str, float, int]


def figures(run: Trained, problems: list[Problem]) -> dict[str, float]:
    metrics = run.result.metrics
    return {
        "exact match": exact_match(write_answers(run.result.student, problems), problems),
        "val/ce": metrics["val/ce"],
        "val/kd": metrics["val/kd"],
        "seconds": run.seconds,
    }


def tokens_of(folder: Path) -> int:
    """The supervised tokens that a run was trained on."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return int(sum(json.loads(line).get("train/supervised_tokens", 0) for line in lines))


def compare(folder: Path, seed: int, sizes: Sizes, settings: list[Setting]) -> dict[Any, dict[str, float]]:
    """The figures of the distilled student and of every setting."""
    problems = make_data(folder / "data", sizes, seed)
    tokenizer = make_tokenizer(folder / "data", sizes.vocab_size)
    for name, shape in (("teacher", sizes.teacher), ("student", sizes.student)):
        make_model(folder / "start" / name, tokenizer, shape, seed)
    teacher = train(folder, "teacher", sizes, seed, folder / "start" / "teacher", steps=sizes.teacher_steps, weight=0.0)
    student, weight = folder / "start" / "student", sizes.distill_loss_weight
    distilled = train(folder, "distilled", sizes, seed, student, weight=weight, teacher=teacher)
    found: dict[Any, dict[str, float]] = {"before": figures(distilled, problems)}
    for setting in settings:
        objective, share, staleness = setting
        name = f"{objective}-{share}-{staleness}"
        stale = {"max_staleness": staleness} if staleness else {}
        run = go_on(
            folder, name, sizes, seed, distilled, teacher, kd_objective=objective, on_policy_fraction=share, **stale
        )
        found[setting] = {**figures(run, problems), "tokens": tokens_of(folder / name)}
    return found


def of_seed(sizes: Sizes, seed: int) -> dict[Any, dict[str, float]]:
    """``compare`` in a folder of its own."""
    configure_logging()
    with TemporaryDirectory() as folder:
        return compare(Path(folder), seed, sizes, SETTINGS + STALE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Sizes.further_steps, help="further steps under each setting")
    options = parser.parse_args()
    sizes = Sizes(further_steps=options.steps)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        results = list(processes.map(partial(of_seed, sizes), range(options.seeds)))
    print(f"{options.seeds} seeds, {options.steps} further steps; mean ± standard deviation")
    for setting in results[0]:
        label = "before" if setting == "before" else "{} λ={:g} staleness {}".format(*setting)
        cells = []
        for key in results[0][setting]:
            values = [result[setting][key] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 0 if key in ("tokens", "seconds") else 3
            cells.append(f"{key} {statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        print(f"{label:36} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
