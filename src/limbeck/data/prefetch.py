"""The next steps are made by a thread while this one trains. What is made, and in which order, is the stream's own affair."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping

import torch

from limbeck.data.batch import StepBatch
from limbeck.data.stream import BatchStream


class PrefetchedStream:
    """``stream``, up to ``ahead`` steps of it made before they are asked for.

    ``position`` is that of the step that is handed out next, not of the one that is made next. An error in the making is
    raised by the ``next`` that would have handed that step out, and by every later one. The thread starts with the first
    ``next`` and ends with ``close``, with this object, or with the interpreter. With a CUDA ``device`` batches wait in pinned
    memory, from which a copy does not hold up the host.
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
        """Where the step that is handed out next is."""
        return dict(self._position)

    def seek(self, position: Mapping[str, int]) -> None:
        """Continue at ``position``; what was made ahead is dropped."""
        self.close()
        self._stream.seek(position)
        self._position = self._stream.position

    def close(self) -> None:
        """End the thread. A later ``next`` goes on where the last one was."""
        if self._end is not None:
            self._end()
        self._work = self._end = None

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._work is None:
            self._stream.seek(self._position)  # an earlier thread may have gone further than what was handed out
            self._work = _Work(self._stream, self._ahead, self._device)
            # Runs at interpreter exit too, while threads still can end in order.
            self._end = weakref.finalize(self, self._work.stop)
        batch, self._position = self._work.take()
        return batch


class _Work:
    """The thread and what it has made; knows nothing of its owner, so that the owner can be forgotten."""

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
        if threading.current_thread() is not self._thread:  # which may be the one that collects the garbage
            self._thread.join()

    def _run(self) -> None:
        try:
            torch.set_num_threads(1)  # of this thread alone: its work is small, and the cores are the training's
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
        except BaseException as error:  # raised where it can be seen: in take()
            with self._changed:
                self._error = error
                self._changed.notify_all()
