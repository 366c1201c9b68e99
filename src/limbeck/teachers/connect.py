"""Selects the implementation of a run's teacher."""

from __future__ import annotations

from limbeck.registry import TEACHERS
from limbeck.teachers.protocol import Teacher, TeacherContext


def connect_teacher(context: TeacherContext) -> Teacher:
    """The teacher that ``teacher.source`` selects. ``auto`` is ``ray`` if the run has workers for the teacher, else
    ``model`` (in this process).

    Raises LimbeckError if no source is registered under that name.
    """
    source = context.config.teacher.source
    if source == "auto":
        source = "ray" if context.workers else "model"
    teacher: Teacher = TEACHERS.get(source)(context)
    return teacher
