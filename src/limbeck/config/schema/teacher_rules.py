"""Rules for a teacher that reads a prompt of its own, or is made of the student's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.config.schema.base import Contradiction
from limbeck.config.schema.models import reads_megatron_keys
from limbeck.config.schema.workers import STUDENT_SOURCES

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields


def teacher_contradictions(config: RunFields) -> Iterator[Contradiction]:
    """Errors in these keys."""
    if config.teacher.source in STUDENT_SOURCES:
        yield from _own_weights_contradictions(config)
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


def _own_weights_contradictions(config: RunFields) -> Iterator[Contradiction]:
    teacher, source = config.teacher, config.teacher.source
    if teacher.model_args.names_a_model:
        yield Contradiction(
            "teacher_pretrain",
            f"is another model than that of teacher.source = {source}, the student's; remove one of them",
        )
    decay = teacher.source_kwargs.get("decay", 0.999)
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        yield Contradiction(
            "teacher.source_kwargs.decay", f"= {decay} must be a number from 0 to below 1, such as 0.999"
        )
    strategy = teacher.strategy_args
    if source == "student_average" and (
        strategy.reads_deepspeed_block
        or reads_megatron_keys(strategy.strategy_name)
        or strategy.strategy_config.ranks_of_a_model > 1
    ):
        yield Contradiction(
            "teacher.strategy_args",
            "gives a teacher whose weights cannot be averaged in place; for student_average use fsdp2_infer or hf_infer "
            "without model parallelism",
        )


def unread_teacher_keys(config: RunFields) -> Iterator[tuple[str, str]]:
    """Keys of the teacher that have no effect, with the reason."""
    if config.teacher.source in STUDENT_SOURCES:
        for key in type(config.teacher.model_args).model_fields:
            yield (
                f"teacher.model_args.{key}",
                f"is not read with teacher.source: {config.teacher.source}, the student's model",
            )
