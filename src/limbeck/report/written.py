"""Answers that the student wrote, from the newest ``rollouts/val-<step>.jsonl``, or else the newest ``train-<step>.jsonl``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

_NAME = re.compile(r"(val|train)-(\d+)\.jsonl")
_SHOWN = 8


@dataclass(frozen=True)
class WrittenSample:
    """One answer. step: at which it was written. reward: None if it is not known. reason: why it is not."""

    step: int
    prompt: str
    completion: str
    reward: float | None
    reason: str


def load_written(folder: Path) -> tuple[WrittenSample, ...]:
    """Returns the student's first answers of the newest validation in a run folder, or of the newest step without validation by
    writing; unreadable lines are left out.
    """
    files = [
        (match[1] == "val", int(match[2]), path)
        for path in (folder / "rollouts").glob("*.jsonl")
        if (match := _NAME.fullmatch(path.name))
    ]
    if not files:
        return ()
    _, step, path = max(files)
    samples: list[WrittenSample] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                if row["origin"] != "student":  # a row of the data, or of the teacher
                    continue
                reward = row["reward"]
                reward = None if reward is None else float(reward)
                samples.append(
                    WrittenSample(step, str(row["prompt"]), str(row["completion"]), reward, str(row["reason"]))
                )
            except (ValueError, KeyError, TypeError):  # the last line of a killed run
                continue
            if len(samples) == _SHOWN:
                break
    return tuple(samples)


def written_html(sample: WrittenSample) -> str:
    """Renders one answer in a card."""
    reward = "no reward" if sample.reward is None else f"reward {sample.reward:g}"
    reason = f" ({sample.reason})" if sample.reason else ""
    verdict = "" if sample.reward is None else " right" if sample.reward > 0 else " wrong"
    return (
        f'<div class="card sample"><p>{escape(sample.prompt)}</p><dl><div><dt>Step {sample.step}</dt>'
        f"<dd>{escape(sample.completion)}</dd>"
        f'<span class="verdict{verdict}">{escape(f"{reward}{reason}")}</span></div></dl></div>'
    )
