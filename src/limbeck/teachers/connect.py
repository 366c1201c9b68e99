"""Connects a run to its teacher, whatever that is."""

from __future__ import annotations

from limbeck.registry import TEACHERS
from limbeck.teachers.protocol import Teacher, TeacherContext


def connect_teacher(context: TeacherContext) -> Teacher:
    """The teacher that ``teacher.source`` selects; ``auto``: Ray workers if the run has any, else a model in this
    process.
    """
    source = context.config.teacher.source
    if source == "auto":
        source = "ray" if context.workers else "model"
    teacher: Teacher = TEACHERS.get(source)(context)
    return teacher
