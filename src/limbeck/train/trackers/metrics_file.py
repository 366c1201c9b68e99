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
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # a line that a kill cut short must not be joined with the next one

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
