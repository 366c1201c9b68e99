"""Who answers. A teacher is asked for the signals of a batch and knows nothing of the student."""

from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.signal import Signal

__all__ = ["LocalTeacher", "Signal"]
