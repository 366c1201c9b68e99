"""Who answers. A teacher is asked for the signals of a batch and knows nothing of the student."""

from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.remote import Channel, RemoteTeacher, Reply, route
from limbeck.teachers.signal import Answer, Question, Signal, Teacher, Wanted
from limbeck.teachers.together import Circle, TogetherTeacher

__all__ = [
    "Answer",
    "Channel",
    "Circle",
    "LocalTeacher",
    "Question",
    "RemoteTeacher",
    "Reply",
    "Signal",
    "Teacher",
    "TogetherTeacher",
    "Wanted",
    "route",
]
