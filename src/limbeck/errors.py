"""Exceptions whose messages are written for users: what is wrong, where, and what to do."""

USER_MISTAKE = 2
"""Exit status of a command after a LimbeckError."""


class LimbeckError(Exception):
    """An error in the input or the environment. The command line prints its message without a traceback."""


class StopTraining(LimbeckError):
    """Ends a run after it has saved a checkpoint: going on makes no sense."""


class WritingError(LimbeckError):
    """A generator or an environment failed; raised on every rank, and before the optimizer has changed anything."""


class UnknownMemory(LimbeckError):
    """What a run holds in memory cannot be determined without running it."""


class Stopped(LimbeckError):
    """A signal stopped a run before it had a result.

    Args:
        sentence: the message.
        signal: number of the signal.
    """

    def __init__(self, sentence: str, signal: int) -> None:
        super().__init__(sentence)
        self.signal = signal
