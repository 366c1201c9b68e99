"""Connects a run to its teacher, whatever that is."""

from __future__ import annotations

from limbeck.registry import TEACHERS
from limbeck.teachers.protocol import Teacher, TeacherContext


def connect_teacher(context: TeacherContext) -> Teacher:
    """The teacher that ``teacher.source`` selects."""
    teacher: Teacher = TEACHERS.get(context.config.teacher_source)(context)
    return teacher
