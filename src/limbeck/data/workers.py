"""Processes that tokenise side by side; what comes out is in the order of what went in.

They are started as ``python -m limbeck.data.workers`` and speak over pipes, so that neither a script without a main guard nor
the threads of this process are in their way. What travels is between our own processes only.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from limbeck.errors import LimbeckError

Batch = TypeVar("Batch")

_LENGTH = struct.Struct("<Q")


class Workers:
    """``count`` processes that each hold ``task``, an object whose ``encode`` they call.

    As a context manager, it leaves no process behind.
    """

    def __init__(self, task: Any, count: int) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "limbeck.data.workers"]
        setup = pickle.dumps(task)
        self._idle: queue.Queue[subprocess.Popen[bytes]] = queue.Queue()
        self._all = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(count)
        ]
        self._threads = ThreadPoolExecutor(count)
        for process in self._all:
            self._threads.submit(self._introduce, process, setup)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._all:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what a killed process left unread
                        pipe.close()

    def encode(
        self, batches: Iterable[Batch], arguments: Callable[[Batch], tuple[Any, ...]]
    ) -> Iterator[tuple[Batch, Any]]:
        """Each batch with what ``encode`` makes of its ``arguments``, in order; only a few are under way at once.

        Raises LimbeckError if a process dies.
        """
        under_way: deque[tuple[Batch, Future[Any]]] = deque()
        for batch in batches:
            under_way.append((batch, self._threads.submit(self._ask, arguments(batch))))
            if len(under_way) > 2 * len(self._all):
                first, answer = under_way.popleft()
                yield first, answer.result()
        for first, answer in under_way:
            yield first, answer.result()

    def _introduce(self, process: subprocess.Popen[bytes], setup: bytes) -> None:
        with contextlib.suppress(OSError):  # a process that died is met by whoever asks it
            _send(process.stdin, setup)
        self._idle.put(process)

    def _ask(self, arguments: tuple[Any, ...]) -> Any:
        process = self._idle.get()
        try:
            _send(process.stdin, pickle.dumps(arguments))
            answer = _receive(process.stdout)
        except (OSError, EOFError) as error:
            raise LimbeckError(
                f"A tokenising process ended (exit code {process.poll()}); its message is above. If memory ran out, "
                "set preprocessing_num_workers: 1."
            ) from error
        finally:
            self._idle.put(process)
        result = pickle.loads(answer)
        if isinstance(result, LimbeckError):
            raise result
        return result


def _send(pipe: Any, message: bytes) -> None:
    pipe.write(_LENGTH.pack(len(message)))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: Any) -> bytes:
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    message = pipe.read(length)
    if len(message) < length:
        raise EOFError
    return message


def _work(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    task = pickle.loads(_receive(incoming))
    while True:
        try:
            arguments = pickle.loads(_receive(incoming))
        except EOFError:  # whoever asked is gone
            return
        try:
            result = task.encode(*arguments)
        except LimbeckError as error:
            result = error
        _send(outgoing, pickle.dumps(result))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides when to stop
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    _work(sys.stdin.buffer, answers)
