"""Connects a run to its teacher, whatever that is."""

from __future__ import annotations

from limbeck.registry import TEACHERS, check_members
from limbeck.teachers.protocol import Teacher, TeacherContext


def connect_teacher(context: TeacherContext) -> Teacher:
    """The teacher that ``teacher.source`` selects. Raises LimbeckError if a plug-in's teacher is incomplete."""
    source = context.config.teacher_source
    teacher: Teacher = TEACHERS.get(source)(context)
    check_members(
        f"the teacher of teacher.source = {source}", teacher, ("info", "request", "metrics", "offload", "reload")
    )
    return teacher
