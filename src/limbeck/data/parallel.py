"""Tokenising in several processes, with the results in input order.

The processes are started by ``loky``, which does not import the main module again, so a script without a main guard and an
interactive session work. They import no torch.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from loky import ProcessPoolExecutor
from loky.process_executor import BrokenProcessPool

from limbeck.data.encode import Encoded, Encoder
from limbeck.errors import LimbeckError

Batch = TypeVar("Batch")

_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
    "OMP_NUM_THREADS": "1",
}

_encoder: Encoder  # of a worker process; set when it starts


def encode_in_parallel(
    encoder: Encoder, batches: Iterable[Batch], arguments: Callable[[Batch], tuple[Any, ...]], processes: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Yields each batch with the result of ``encoder.encode(*arguments(batch))``, in input order.

    At most ``2 * processes + 1`` batches are in memory at once. The processes are killed when the iterator is exhausted or
    closed, and on any error. Raises LimbeckError if a process dies.
    """
    executor = ProcessPoolExecutor(processes, initializer=_start, initargs=(encoder, os.getpid()), env=_ENVIRONMENT)
    pending: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            pending.append((batch, executor.submit(_encode, *arguments(batch))))
            if len(pending) > 2 * processes:
                first, future = pending.popleft()
                yield first, _result(future, executor)
        while pending:
            first, future = pending.popleft()
            yield first, _result(future, executor)
    except BrokenProcessPool as error:
        codes = re.search(r"\{(.*)\}", str(error))
        raise LimbeckError(
            f"A tokenising process ended unexpectedly ({codes[1] if codes else error}). Its message, if it wrote one, is "
            "above. If memory ran out, set preprocessing_num_workers: 1."
        ) from error
    finally:
        executor.shutdown(wait=True, kill_workers=True)


def _result(future: Future[Encoded], executor: ProcessPoolExecutor) -> Encoded:
    """Waits for a result.

    loky itself waits forever for the rest of a message whose sender was killed. Closing every writing end of that pipe makes
    it raise BrokenProcessPool, but with a message about the torn result, so that the exit codes are added here.
    """
    while not wait([future], timeout=1).done:
        workers = list((executor._processes or {}).values())
        codes = {worker.exitcode for worker in workers} - {None, 0}
        if not codes or wait([future], timeout=5).done:  # loky usually notices by itself
            continue
        for worker in workers:
            worker.terminate()
        # loky closes this end as well, in its own thread: give it another file instead of closing it twice.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, executor._result_queue._writer.fileno())
        os.close(nowhere)
        if (error := future.exception()) is not None:
            raise BrokenProcessPool("{" + ", ".join(map(_exit_code, sorted(codes))) + "}") from error
    return future.result()


def _exit_code(code: int) -> str:
    return f"{signal.Signals(-code).name}({code})" if -code in set(signal.Signals) else f"EXIT({code})"


def _start(encoder: Encoder, parent: int) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides when to stop
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    _encoder = encoder


def _exit_with(parent: int) -> None:
    """End this process when its parent was killed and could not end it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode(*arguments: Any) -> Encoded:
    return _encoder.encode(*arguments)
