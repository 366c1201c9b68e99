"""Progress on the console: a progress bar in a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column


def numbers(values: Mapping[str, float]) -> str:
    """The metrics that the console shows, as text."""
    shown = [
        ("loss", "train/loss", ".4f"),
        ("kd", "train/train_distill_loss", ".4f"),
        ("ce", "train/train_student_loss", ".4f"),
        ("agree", "train/top1_agreement", ".1%"),
        ("tok/s", "train/tokens_per_second", ",.0f"),
    ]
    return "  ".join(f"{label} {values[key]:{form}}" for label, key, form in shown if key in values)


@contextmanager
def row_counter(*, enabled: bool) -> Iterator[Callable[[int], None] | None]:
    """A live counter of tokenized rows in a terminal.

    Yields:
        A function that takes the number of rows so far; None if not ``enabled`` or not in a terminal.
    """
    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("tokenizing"), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tokenizing", total=None)
        yield lambda rows: bar.update(task, completed=rows)


class RunConsole:
    """Progress of one run.

    Args:
        title: name of the run.
        total: number of steps.
        start: step from which the run starts.
        enabled: False prints nothing; True on the main process.
        file: where to print; standard output by default.
    """

    def __init__(self, title: str, total: int, start: int, *, enabled: bool, file: TextIO | None = None) -> None:
        self._console = Console(quiet=not enabled, file=file)
        self._title, self._total, self._start, self._begun = title, total, start, time.perf_counter()
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            # On narrow terminals the metrics are shortened, not these columns.
            whole = Column(no_wrap=True, min_width=max(7, 2 * len(str(total)) + 1))
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=max(4, min(24, self._console.width - 116))),
                MofNCompleteColumn(table_column=whole),
                TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                TimeElapsedColumn(table_column=whole),
                TextColumn("left", table_column=Column(min_width=4)),
                TimeRemainingColumn(table_column=whole),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(title, total=total, completed=start, numbers="")

    def __enter__(self) -> RunConsole:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def print(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Show that step ``step`` is complete."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of step ``step``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers(values))
            return
        left = (time.perf_counter() - self._begun) / max(step - self._start, 1) * (self._total - step)
        eta = time.strftime("%H:%M:%S", time.gmtime(left))
        self.print(f"{self._title}: step {step}/{self._total}  {numbers(values)}  left {eta}")
