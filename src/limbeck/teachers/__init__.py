"""Who answers. A teacher is asked for the signals of a batch and knows nothing of the student."""

from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.signal import Signal
from limbeck.teachers.together import Circle, TogetherTeacher

__all__ = ["Circle", "LocalTeacher", "Signal", "TogetherTeacher"]
