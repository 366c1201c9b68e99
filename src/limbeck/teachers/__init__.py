"""Teachers: requests in, signals out. A teacher knows nothing of the student."""

from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.protocol import SignalFuture, Teacher, TeacherContext, TeacherInfo
from limbeck.teachers.remote import Channel, RemoteTeacher, TeacherDescription, connect_channels, route
from limbeck.teachers.signals import Signal, SignalSpec, TeacherRequest, TeacherResponse

__all__ = [
    "Channel",
    "LocalTeacher",
    "RemoteTeacher",
    "Signal",
    "SignalFuture",
    "SignalSpec",
    "Teacher",
    "TeacherContext",
    "TeacherDescription",
    "TeacherInfo",
    "TeacherRequest",
    "TeacherResponse",
    "connect_channels",
    "route",
]
