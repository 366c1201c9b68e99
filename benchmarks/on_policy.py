"""What a share of on-policy samples does for a student: λ = 0, 0.5 and 1, forward and reverse KL, and staleness.

    python benchmarks/on_policy.py                       # three seeds; about 17 minutes on two cores
    python benchmarks/on_policy.py --seeds 1 --steps 50

Every core trains one model at a time, in one thread. For each seed, the teacher and the distilled student of ``limbeck demo``
are trained; then the student goes on for the same number of steps under each setting. All settings have the same prompts and
the same number of samples per step. The student writes the share λ of the answers; the others are those of the data, of which
30 % are wrong. The figures are means over the seeds with the standard deviation after ±.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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


class Prepared(NamedTuple):
    """What the settings of a seed share: its folder, the teacher and the distilled student."""

    folder: Path
    seed: int
    problems: list[Problem]
    teacher: Trained
    distilled: Trained


def prepare(root: Path, sizes: Sizes, seed: int) -> tuple[Prepared, dict[str, float]]:
    """Train both models of a seed. Returns them with the figures of the student."""
    configure_logging()
    folder = root / str(seed)
    problems = make_data(folder / "data", sizes, seed)
    tokenizer = make_tokenizer(folder / "data", sizes.vocab_size)
    for name, shape in (("teacher", sizes.teacher), ("student", sizes.student)):
        make_model(folder / "start" / name, tokenizer, shape, seed)
    teacher = train(folder, "teacher", sizes, seed, folder / "start" / "teacher", steps=sizes.teacher_steps, weight=0.0)
    student, weight = folder / "start" / "student", sizes.distill_loss_weight
    distilled = train(folder, "distilled", sizes, seed, student, weight=weight, teacher=teacher)
    return Prepared(folder, seed, problems, teacher, distilled), figures(distilled, problems)


def measure(models: Prepared, sizes: Sizes, setting: Setting) -> dict[str, float]:
    """The figures of the student after the further steps of a setting."""
    configure_logging()
    objective, share, staleness = setting
    name = f"{objective}-{share}-{staleness}"
    rollout = {"on_policy_fraction": share, **({"max_staleness": staleness} if staleness else {})}
    folder, seed, problems, teacher, distilled = models
    run = go_on(folder, name, sizes, seed, distilled, teacher, kd_objective=objective, **rollout)
    return {**figures(run, problems), "tokens": tokens_of(folder / name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Sizes.further_steps, help="further steps under each setting")
    options = parser.parse_args()
    sizes = Sizes(further_steps=options.steps)
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[Any, list[dict[str, float]]] = {"before": []}
    waiting: dict[Setting, list[Future[dict[str, float]]]] = {setting: [] for setting in SETTINGS + STALE}
    with TemporaryDirectory() as root, ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        seeds = [processes.submit(prepare, Path(root), sizes, seed) for seed in range(options.seeds)]
        for seed in as_completed(seeds):
            models, before = seed.result()
            results["before"].append(before)
            for setting, futures in waiting.items():
                futures.append(processes.submit(measure, models, sizes, setting))
        results |= {setting: [future.result() for future in futures] for setting, futures in waiting.items()}
    print(f"{options.seeds} seeds, {options.steps} further steps; mean ± standard deviation")
    for setting, found in results.items():
        label = "before" if setting == "before" else "{} λ={:g} staleness {}".format(*setting)
        cells = []
        for key in found[0]:
            values = [result[key] for result in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 0 if key in ("tokens", "seconds") else 3
            cells.append(f"{key} {statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        print(f"{label:36} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
