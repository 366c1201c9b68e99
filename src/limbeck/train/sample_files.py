"""Samples as JSON lines: ``<output_dir>/rollouts/train-<step>.jsonl`` and ``val-<step>.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data.masks import IGNORE
from limbeck.train.samples import Sample

FOLDER = "rollouts"


def sample_row(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """A sample as text. The completion begins with the first supervised token, and contains replies of the environment."""
    start = int(np.argmax(sample.labels != IGNORE)) + 1 if sample.num_answer_tokens else len(sample.tokens)
    return {
        "row": sample.row,
        "number": sample.number,
        "origin": sample.origin,
        "prompt": tokenizer.decode(sample.tokens[:start].tolist()),
        "completion": tokenizer.decode(sample.tokens[start:].tolist()),
        "finished": sample.finished,
        "reward": sample.reward,
        "reason": sample.reason,
    }


def save_samples(output_dir: str, name: str, samples: Sequence[Sample], tokenizer: Any) -> Path:
    """Write ``rollouts/<name>.jsonl``, in place of an earlier file of this name."""
    path = Path(output_dir) / FOLDER / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(sample_row(sample, tokenizer), ensure_ascii=False) + "\n" for sample in samples)
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    return path
