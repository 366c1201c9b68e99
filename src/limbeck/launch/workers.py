"""The two kinds of worker that a run on a cluster consists of: teacher ranks that answer, student ranks that train.

They run the same teacher and the same loop as a process without a cluster does. How they are placed, and what happens when one
dies, is not known here. Whoever starts workers imports this file, so that models and losses are imported by the workers alone.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.cluster.groups import Worker, failures_logged
from limbeck.cluster.tensors import Flat, flat
from limbeck.config import DistillConfig
from limbeck.interrupt import StopRequest
from limbeck.models.logs import configure_logging
from limbeck.strategies.host_memory import keep_freed_pages
from limbeck.teachers.fingerprint import teacher_fingerprint
from limbeck.train.result import RunResult

if TYPE_CHECKING:
    from limbeck.teachers import LocalTeacher, TeacherRequest

_MORE_ROOM = "name more devices in teacher.device_mapping with teacher.strategy_args.strategy_name: fsdp2_infer"


class TeacherWorker(Worker):
    """A rank of the teacher. Alone in its world it can be started again at any time: nothing that it knows is lost."""

    needs = "limbeck.train.build.models"

    def __init__(self, name: str, log: str, values: Mapping[str, Any]) -> None:
        super().__init__(name, log)
        self.config = DistillConfig.model_validate(values)
        self._rests, self._answered = False, 0

    @cached_property
    def teacher(self) -> LocalTeacher:
        """Loaded when it is first needed, which may be after a new start."""
        from limbeck.models import explain_oom
        from limbeck.train.build.models import make_teacher

        configure_logging()
        if self.world.device.type == "cpu":
            keep_freed_pages()
        with failures_logged(), explain_oom(f"{self.name} loaded the teacher", _MORE_ROOM):
            return make_teacher(self.config, self.world)

    def load(self) -> tuple[int, int]:
        """Load the teacher; returns the numbers of its parameters and of its output head's rows."""
        return self.teacher.num_parameters, self.teacher.vocab_size

    def head(self) -> dict[str, Any]:
        """The output head, which is sent once."""
        head = self.teacher.head
        return {
            "weight": flat(head.weight),
            "bias": None if head.bias is None else flat(head.bias),
            "softcap": head.softcap,
            "scale": head.scale,
        }

    def check(self, longest_row: int, largest_token: int) -> None:
        """Raise LimbeckError unless the teacher can read the data, which is in its own tokens."""
        from limbeck.train.build.models import check_teacher

        check_teacher(self.teacher, self.config, longest_row, largest_token)

    def serves(self) -> dict[str, Any]:
        """What the answers depend on, beside the question."""
        return teacher_fingerprint(self.config)

    def answer(self, question: TeacherRequest | None) -> tuple[tuple[Flat, ...], float]:
        """What is wanted of the positions asked about, and the seconds that took; None wants nothing, in as many passes."""
        said, seconds = self.say(question)
        begun = time.perf_counter()
        return tuple(map(flat, said)), seconds + time.perf_counter() - begun

    def rest(self) -> None:
        """Leave the device until the next question."""
        with failures_logged():
            self.teacher.move("cpu")
            torch.cuda.empty_cache()
        self._rests = True
        print(f"{self._answered} questions answered; the teacher rests", flush=True)
        self._answered = 0

    def say(self, question: TeacherRequest | None) -> tuple[tuple[Tensor, ...], float]:
        """The same as tensors on this worker's device."""
        from limbeck.models import explain_oom
        from limbeck.teachers import TeacherRequest

        begun = time.perf_counter()
        if question is None:
            nothing = torch.zeros(0, dtype=torch.int64)
            question = TeacherRequest(torch.zeros(1, 1, dtype=torch.int64), None, None, nothing)
        asked = question.to(self.world.device)
        with failures_logged(), explain_oom(f"{self.name} answered", _MORE_ROOM):
            if self._rests:
                self.teacher.move(self.world.device)
                self._rests = False
            self._answered += 1
            return self.teacher.say(asked), time.perf_counter() - begun


class StudentWorker(Worker):
    """A rank of the student: the ordinary loop, with a teacher that is somewhere else, or with its own."""

    needs = "limbeck.train.loop"

    def __init__(self, name: str, log: str, values: Mapping[str, Any]) -> None:
        super().__init__(name, log)
        self.config = DistillConfig.model_validate(values)
        self._stop = StopRequest()
        self._told = _Told()

    def run(self, teachers: Sequence[Any], in_step: bool) -> RunResult:
        """Train to the end. ``teachers``: the teacher's workers, none if the student's processes hold one themselves."""
        from limbeck.teachers.connect import remote_teacher
        from limbeck.train.loop import DistillPipeline

        find = partial(remote_teacher, teachers, in_step) if teachers else None
        with failures_logged():
            return DistillPipeline(self.config).run_in(self.world, find, self._stop, self._told)

    def stop(self, number: int) -> None:
        """Ask the loop to end after the step it is in, as the signal ``number`` would."""
        self._stop.signal = number

    def told(self) -> tuple[int, list[str]]:
        """How many steps the loop has made, and the lines for a person since the last call."""
        return self._stop.looks, self._told.take()


class _Told(io.StringIO):
    """Takes lines for a person: into this worker's log, and kept until somebody fetches them."""

    def __init__(self) -> None:
        super().__init__()
        self._lock, self._text = threading.Lock(), ""

    def write(self, text: str) -> int:
        with self._lock:
            self._text += text
        return sys.stdout.write(text)

    def take(self) -> list[str]:
        with self._lock:
            whole, _, self._text = self._text.rpartition("\n")
        return whole.splitlines()
