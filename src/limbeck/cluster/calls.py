"""Waits for the results of calls to Ray actors, and turns every failure into one of two exceptions.

A user's mistake stays a ``LimbeckError``. Everything else, such as a worker that dies, hangs or loses its peers, is
``WorkerLost``: resuming from the last checkpoint is worth a try.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from limbeck.cluster.session import load_ray
from limbeck.errors import LimbeckError

_POLL_SECONDS = 0.1

Poll = Callable[[], None]
"""Called repeatedly while a result is awaited; an exception that it raises ends the wait."""


def no_poll() -> None:
    """The poll that does nothing."""


class WorkerLost(Exception):
    """A worker died, hung, or failed in a way that may be another worker's fault."""


def result(ref: Any, name: str, seconds: float | None, poll: Poll | None = None) -> Any:
    """The return value of a call to the worker ``name``. ``seconds``: None waits without limit.

    Raises LimbeckError if the call raised one, WorkerLost for everything else.
    """
    ray = load_ray()
    if poll is not None:
        until = math.inf if seconds is None else time.monotonic() + seconds
        while not ray.wait([ref], timeout=_POLL_SECONDS)[0] and time.monotonic() < until:
            poll()
        poll()
    try:
        return ray.get(ref, timeout=seconds if poll is None else 0)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, LimbeckError):
            raise cause from None
        if isinstance(cause, WorkerLost):
            raise WorkerLost(str(cause)) from error
        raise WorkerLost(f"{name} failed: {type(cause).__name__}: {_first_line(cause)}") from error
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerLost(f"{name} has not responded for {seconds:.0f} s") from error
    except ray.exceptions.OutOfMemoryError as error:
        raise LimbeckError(
            f"{name} was ended because its machine ran out of memory; place fewer ranks on a machine, use smaller models, or "
            "lower student.training_args.per_device_train_batch_size or sequence_length."
        ) from error
    except ray.exceptions.RayError as error:
        raise WorkerLost(f"{name} died ({type(error).__name__})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
