"""Rules for a teacher that reads a prompt of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.config.schema.base import Contradiction

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields


def teacher_contradictions(config: RunFields) -> Iterator[Contradiction]:
    """Errors in these keys."""
    prompt = config.teacher.prompt
    if prompt is None:
        return
    if (prompt.key is None) == (prompt.template is None):
        yield Contradiction("teacher.prompt", "needs either key, a column, or template; set one of them")
    if not config.has_teacher:
        yield Contradiction("teacher.prompt", "needs a teacher; set teacher_pretrain")
    others = {
        "distill_on_prompt": config.distill_on_prompt,
        "features.pairs": bool(config.features.pairs),
        "objective_faults": bool(config.objective_faults),
        "student.data_args.overlong: split": config.student.data_args.overlong == "split",
        "rollout.off_policy: teacher": config.rollout is not None and config.rollout.off_policy == "teacher",
    }
    for other in (name for name, given in others.items() if given):
        yield Contradiction(
            "teacher.prompt",
            f"takes the place of the student's prompt for the teacher, so that only answers correspond; {other} needs the same "
            "prompt, so remove one of them",
        )
