"""``metrics.jsonl``, which every run writes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, appended and flushed at once, so that a killed run loses nothing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: a line that a full disk does not take must not be written again when the file is closed.
        self._file = path.open("ab", buffering=0)
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # a line that a kill cut short must not be joined with the next one

    def log(self, step: int, values: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}).encode() + b"\n"
        while line:  # a write may take a part of it
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()
