"""Who answers. A teacher is asked for the signals of a batch and knows nothing of the student."""

from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.model_parallel import ModelParallelGroup, ModelParallelTeacher
from limbeck.teachers.remote import Channel, RemoteTeacher, TeacherResponse, route
from limbeck.teachers.signals import Signal, SignalFuture, SignalSpec, Teacher, TeacherRequest

__all__ = [
    "Channel",
    "LocalTeacher",
    "ModelParallelGroup",
    "ModelParallelTeacher",
    "RemoteTeacher",
    "Signal",
    "SignalFuture",
    "SignalSpec",
    "Teacher",
    "TeacherRequest",
    "TeacherResponse",
    "route",
]
