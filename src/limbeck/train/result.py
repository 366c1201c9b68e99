"""How a run ended; light to import, for those who only wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    student: the folder that ``from_pretrained`` loads. stopped_by: a signal's number, or 0. out_of_time: it stopped because of
    ``checkpoint_config.save_before``.
    """

    student: Path
    step: int
    metrics: Mapping[str, float]
    stopped_by: int = 0
    out_of_time: bool = False
