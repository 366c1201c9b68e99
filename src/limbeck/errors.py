"""The one exception that a user is meant to read: a sentence saying what is wrong, where, and what to do."""


class LimbeckError(Exception):
    """A mistake in the input or the environment, told in one sentence. The command line prints it without a traceback."""
