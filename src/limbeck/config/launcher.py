"""The number of processes of a run, from the environment variables that launchers such as torchrun set."""

from __future__ import annotations

import os
from collections.abc import Mapping

from limbeck.errors import LimbeckError


def launched_processes(environment: Mapping[str, str] = os.environ, variable: str = "WORLD_SIZE") -> int | None:
    """The number in ``variable``; None if no launcher has set it.

    Raises:
        LimbeckError: if it is no number of processes.
    """
    value = environment.get(variable)
    if value is None:
        return None
    if not value.strip().isdecimal() or int(value) < 1:
        raise LimbeckError(
            f"the environment variable {variable} = {value!r} is not a number of processes; unset it, or start the run with "
            "torchrun, which sets it."
        )
    return int(value)
