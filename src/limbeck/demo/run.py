"""``limbeck demo``: shows the effect of distillation in minutes on a CPU.

A teacher trains on many clean arithmetic word problems. A smaller student has a small file in which some answers are wrong. It
is trained twice from the same weights, on the same batches, for the same number of steps: with cross-entropy only, and
distilled. Then the distilled student goes on in two ways, for the same number of steps: off-policy, on the answers of the
file, and on-policy, on answers that it writes itself. All are measured on unseen problems. All runs use the ordinary pipeline
with fixed settings.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

from limbeck.demo.problems import Problem
from limbeck.demo.training import (
    Sizes,
    Trained,
    exact_match,
    go_on,
    is_right,
    make_data,
    make_model,
    make_tokenizer,
    train,
    write_answers,
)
from limbeck.errors import LimbeckError
from limbeck.models.logs import configure_logging
from limbeck.report import Answer, Level, ResultRow, ResultTable, Sample, load_run, write_report


def run_demo(folder: Path, *, seed: int = 0, sizes: Sizes | None = None) -> Path:
    """Runs the demo in ``folder``, prints its table and returns the path of its report."""
    from rich.console import Console

    configure_logging()
    sizes, console, begun = sizes or Sizes(), Console(), time.perf_counter()
    _clear(folder)
    held_out = make_data(folder / "data", sizes, seed)
    tokenizer = make_tokenizer(folder / "data", sizes.vocab_size)
    for name, shape in (("teacher", sizes.teacher), ("student", sizes.student)):
        make_model(folder / "start" / name, tokenizer, shape, seed)

    student, weight = folder / "start" / "student", sizes.distill_loss_weight
    console.rule("[bold]1 of 5: a teacher, from many clean problems", align="left")
    teacher = train(folder, "teacher", sizes, seed, folder / "start" / "teacher", steps=sizes.teacher_steps, weight=0.0)
    console.rule("[bold]2 of 5: the student alone, from the small file", align="left")
    alone = train(folder, "cross-entropy", sizes, seed, student, weight=0.0, teacher=teacher)
    console.rule("[bold]3 of 5: the same student on the same file, distilled", align="left")
    distilled = train(folder, "distilled", sizes, seed, student, weight=weight, teacher=teacher)
    console.rule("[bold]4 of 5: the distilled student goes on off-policy, with the answers of the file", align="left")
    off_policy = go_on(folder, "off-policy", sizes, seed, distilled, teacher, on_policy_fraction=0)
    console.rule("[bold]5 of 5: the distilled student goes on on-policy, with answers of its own", align="left")
    on_policy = go_on(folder, "on-policy", sizes, seed, distilled, teacher, on_policy_fraction=1)

    runs = {
        "Teacher": teacher,
        "Cross-entropy": alone,
        "Distilled": distilled,
        "then off-policy": off_policy,
        "then on-policy": on_policy,
    }
    written = {name: write_answers(run.result.student, held_out) for name, run in runs.items()}
    table = _table(runs, written, held_out)
    samples = _samples(written, held_out)
    page = write_report(
        [load_run(folder / name) for name in ("cross-entropy", "distilled")],
        folder / "report.html",
        title="The same student, without and with a teacher",
        summary=_summary(sizes),
        table=table,
        samples=samples,
        levels=[Level("val/ce", "teacher", teacher.result.metrics["val/ce"])],
    )
    _print_table(console, table)
    console.print(f"{time.perf_counter() - begun:.0f} seconds in all. Report: {page}", highlight=False, soft_wrap=True)
    return page


def _clear(folder: Path) -> None:
    marker = folder / ".limbeck-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise LimbeckError(f"{folder} contains files that are not from a demo; choose an empty folder with --output.")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    marker.touch()


def _table(runs: dict[str, Trained], written: dict[str, list[str]], held_out: list[Problem]) -> ResultTable:
    def row(label: str, key: str, better: Any, note: str, *, percent: bool = False) -> ResultRow:
        values = tuple(run.result.metrics.get(key) for run in runs.values())
        return ResultRow(label, values, better, note, percent)

    exact = tuple(exact_match(written[name], held_out) for name in runs)
    return ResultTable(
        tuple(runs),
        (
            row("Held-out loss", "val/ce", "lower", "cross-entropy per answer token, nats"),
            row("Divergence from the teacher", "val/kd", "lower", "KL(teacher ‖ student) per answer token, nats"),
            row(
                "Top-1 agreement", "val/top1_agreement", "higher", "with the teacher's most likely token", percent=True
            ),
            ResultRow("Exact match", exact, "higher", f"final number, {len(held_out)} unseen problems", True),
            ResultRow("Seconds", tuple(run.seconds for run in runs.values()), "lower", "training and validation"),
        ),
        reference="Teacher",
    )


def _samples(written: dict[str, list[str]], held_out: list[Problem]) -> list[Sample]:
    """Returns four held-out problems, drawn at random."""
    chosen = random.Random(0).sample(range(len(held_out)), 4)
    return [
        Sample(
            held_out[i].question,
            held_out[i].answer,
            tuple(
                Answer(name, answers[i], is_right(answers[i], held_out[i]))
                for name, answers in written.items()
                if name != "Teacher"
            ),
        )
        for i in chosen
    ]


def _summary(sizes: Sizes) -> str:
    return (
        f"The teacher learned from {sizes.teacher_problems:,} clean problems. The student, a fraction of its size, has "
        f"{sizes.student_problems:,}, and in {sizes.slips:.0%} of them the worked answer contains an error. With "
        f"cross-entropy only, the student learns these errors too; distilled, it also learns from the teacher's distribution. "
        f"Both students start from the same weights and train on the same batches for {sizes.student_steps} steps. The "
        f"distilled student then goes on in two ways, each for {sizes.further_steps} further steps on the same prompts and "
        "with the teacher's distribution only: off-policy on the answers of its file, which is the control, and on-policy on "
        "answers that it writes itself. The curves are those of the first two students."
    )


def _print_table(console: Any, table: ResultTable) -> None:
    from rich.table import Table

    drawn = Table(title="On unseen problems", title_justify="left")
    drawn.add_column("", no_wrap=True)
    for row in table.rows:
        drawn.add_column(row.label, justify="right")
    for column, name in enumerate(table.columns):
        values = ((row.values[column], row.percent) for row in table.rows)
        drawn.add_row(
            name,
            *("–" if value is None else f"{value:.1%}" if percent else f"{value:.3f}" for value, percent in values),
        )
    console.print(drawn)
