"""Makes the next steps of a stream in a thread while the current one trains."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping

import torch

from limbeck.data.batch import StepBatch
from limbeck.data.stream import BatchStream


class PrefetchedStream:
    """An iterator over ``stream`` that makes up to ``ahead`` steps in advance.

    ``position`` is that of the step that ``next`` returns, not of the step that the thread makes. An error in the thread is
    raised by the ``next`` that would have returned the failed step, and by every later one. The thread starts with the first
    ``next`` and ends with ``close``, with this object, or with the interpreter. With a CUDA ``device`` batches are in pinned
    memory, so copies to the device are asynchronous.
    """

    def __init__(self, stream: BatchStream, *, ahead: int = 2, device: torch.device | None = None) -> None:
        self._stream = stream
        self._ahead = ahead
        self._device = device if device is not None and device.type == "cuda" else None
        self._work: _Work | None = None
        self._end: weakref.finalize[..., PrefetchedStream] | None = None
        self._position = stream.position

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self._stream.steps_per_epoch

    @property
    def position(self) -> dict[str, int]:
        """The position of the step that ``next`` returns."""
        return dict(self._position)

    def seek(self, position: Mapping[str, int]) -> None:
        """Continues at ``position`` and discards the steps made in advance."""
        self.close()
        self._stream.seek(position)
        self._position = self._stream.position

    def close(self) -> None:
        """Ends the thread. A later ``next`` continues after the last step returned."""
        if self._end is not None:
            self._end()
        self._work = self._end = None

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._work is None:
            self._stream.seek(self._position)  # an earlier thread may have made more steps than were returned
            self._work = _Work(self._stream, self._ahead, self._device)
            # Runs at interpreter exit too, while threads still can end in order.
            self._end = weakref.finalize(self, self._work.stop)
        batch, self._position = self._work.take()
        return batch


class _Work:
    """The thread and its steps. It holds no reference to its owner, so that the owner can be garbage-collected."""

    def __init__(self, stream: BatchStream, ahead: int, device: torch.device | None) -> None:
        self._stream, self._room, self._device = stream, ahead, device
        self._made: deque[tuple[StepBatch, dict[str, int]]] = deque()
        self._error: BaseException | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="limbeck-batches", daemon=True)
        self._thread.start()

    def take(self) -> tuple[StepBatch, dict[str, int]]:
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._error is not None)
            if not self._made:
                assert self._error is not None
                raise self._error
            made = self._made.popleft()
            self._changed.notify_all()
            return made

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # garbage collection may run in that thread
            self._thread.join()

    def _run(self) -> None:
        try:
            torch.set_num_threads(1)  # in this thread only; the cores belong to the training
            if self._device is not None:
                torch.cuda.set_device(self._device)
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or len(self._made) < self._room)
                    if self._stopping:
                        return
                batch = next(self._stream)
                made = (batch if self._device is None else batch.pin_memory(), self._stream.position)
                with self._changed:
                    self._made.append(made)
                    self._changed.notify_all()
        except BaseException as error:  # raised in take()
            with self._changed:
                self._error = error
                self._changed.notify_all()
