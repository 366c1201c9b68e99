"""Rules between the keys that select which parameters of the student are trained."""

from __future__ import annotations

import re
from collections.abc import Iterator

from limbeck.config.schema.base import Contradiction
from limbeck.config.schema.models import StudentModelArgs

_SECTION = "student.model_args"


def freezing_contradictions(student: StudentModelArgs) -> Iterator[Contradiction]:
    keys = ("freeze_module_prefix", "unfrozen_parameters", "frozen_parameters", "lora_target")
    given = [key for key in keys if getattr(student, key) is not None]
    if "lora_target" in given and len(given) > 1:
        yield Contradiction(
            f"{_SECTION}.{given[0]}", "contradicts lora_target: LoRA freezes everything but its adapters; keep one"
        )
    elif "unfrozen_parameters" in given and "freeze_module_prefix" in given:
        yield Contradiction(
            f"{_SECTION}.freeze_module_prefix", "contradicts unfrozen_parameters; use frozen_parameters instead"
        )
    for key in ("unfrozen_parameters", "frozen_parameters"):
        for entry in getattr(student, key) or ():
            if problem := _problem(entry, student.parameter_match):
                yield Contradiction(f"{_SECTION}.{key}", f"has the entry {entry!r}, which {problem}")
    if student.unfrozen_parameters == []:
        yield Contradiction(f"{_SECTION}.unfrozen_parameters", "is empty, which freezes everything; name parameters")


def _problem(entry: str, match: str) -> str | None:
    """What is wrong with an entry, as the end of a sentence; None if nothing is."""
    if not entry.strip():
        return "is empty; remove it"
    if match == "regex":
        try:
            re.compile(entry)
        except re.error as error:
            return f"is not a regular expression ({error}); correct it"
    return None
