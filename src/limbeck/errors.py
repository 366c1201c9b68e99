"""The exceptions that a user is meant to read: a sentence saying what is wrong, where, and what to do."""


class LimbeckError(Exception):
    """A mistake in the input or the environment, told in one sentence. The command line prints it without a traceback."""


class UnknownMemory(LimbeckError):
    """What a run holds in memory cannot be determined without running it."""


class Stopped(LimbeckError):
    """A run was asked to stop before it had a result. signal: which signal asked."""

    def __init__(self, sentence: str, signal: int) -> None:
        super().__init__(sentence)
        self.signal = signal
