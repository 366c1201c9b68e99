"""The two kinds of worker that a run on a cluster consists of: teacher ranks that answer, student ranks that train.

They run the same teacher and the same loop as a process without a cluster does. How they are placed, and what happens when one
dies, is not known here.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from limbeck.cluster.channel import RayChannel
from limbeck.cluster.wire import Flat, flat, unflat
from limbeck.cluster.workers import Worker, failures_logged, result
from limbeck.config import DistillConfig
from limbeck.models import out_of_memory_told
from limbeck.objectives import OutputHead
from limbeck.pipeline.distill import DistillPipeline, RunResult
from limbeck.pipeline.fit import answers_as
from limbeck.pipeline.inputs import Data
from limbeck.pipeline.interrupt import StopRequest
from limbeck.pipeline.parts import check_teacher, make_teacher
from limbeck.pipeline.quiet import quiet_libraries
from limbeck.strategies.host_memory import keep_freed_pages
from limbeck.strategies.world import World
from limbeck.teachers import LocalTeacher, Question, RemoteTeacher, route

_MORE_ROOM = "name more devices in teacher.device_mapping with teacher.strategy_args.strategy_name: fsdp2_infer"


class TeacherWorker(Worker):
    """A rank of the teacher. Alone in its world it can be started again at any time: nothing that it knows is lost."""

    def __init__(self, name: str, log: str, values: Mapping[str, Any]) -> None:
        super().__init__(name, log)
        self.config = DistillConfig.model_validate(values)

    @cached_property
    def teacher(self) -> LocalTeacher:
        """Loaded when it is first needed, which may be after a new start."""
        quiet_libraries()
        if self.world.device.type == "cpu":
            keep_freed_pages()
        with failures_logged(), out_of_memory_told(f"{self.name} loaded the teacher", _MORE_ROOM):
            return make_teacher(self.config, self.world)

    def load(self) -> int:
        """Load the teacher; returns its parameters' number."""
        return self.teacher.num_parameters

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
        check_teacher(self.teacher, self.config, longest_row, largest_token)

    def serves(self) -> dict[str, Any]:
        """What the answers depend on, beside the question."""
        return answers_as(self.config)

    def answer(self, question: Question | None) -> tuple[Flat, float]:
        """Hidden states at the positions asked about, and the seconds that took; None gives none, in as many passes."""
        begun = time.perf_counter()
        asked = (_NOTHING if question is None else question).to(self.world.device)
        with failures_logged(), out_of_memory_told(f"{self.name} answered", _MORE_ROOM):
            hidden = flat(self.teacher.hidden(asked))
        return hidden, time.perf_counter() - begun


_NOTHING = Question(torch.zeros(1, 1, dtype=torch.int64), None, None, torch.zeros(0, dtype=torch.int64))


class StudentWorker(Worker):
    """A rank of the student: the ordinary loop, with a teacher that is somewhere else, or with its own."""

    def __init__(self, name: str, log: str, values: Mapping[str, Any]) -> None:
        super().__init__(name, log)
        self.config = DistillConfig.model_validate(values)
        self._stop = StopRequest()
        self._told = _Told()

    def run(self, teachers: Sequence[Any], in_step: bool) -> RunResult:
        """Train to the end. ``teachers``: the teacher's workers, none if the student's processes hold one themselves."""
        find = partial(_remote_teacher, teachers, in_step) if teachers else None
        with failures_logged():
            return DistillPipeline(self.config).run_in(self.world, find, self._stop, self._told)

    def stop(self, number: int) -> None:
        """Ask the loop to end after the step it is in, as the signal ``number`` would."""
        self._stop.signal = number

    def told(self) -> list[str]:
        """The lines for a person since the last call."""
        return self._told.take()


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


def _remote_teacher(
    actors: Sequence[Any], in_step: bool, config: DistillConfig, world: World, data: Data
) -> RemoteTeacher:
    seconds = 60 * config.teacher.backend_timeout
    way = route(world.rank, world.size, len(actors), in_step=in_step)
    channels = [RayChannel(actor, f"teacher-{rank}", seconds) for rank, actor in enumerate(actors)]
    first = actors[way.mine[0]]
    name = channels[way.mine[0]].name
    if data.translator is None:  # which keeps to what the teacher's configuration says
        result(first.check.remote(data.longest_row, data.largest_token), name, seconds)
    size = result(first.load.remote(), name, seconds)
    sent = result(first.head.remote(), name, seconds)
    weight, bias = (None if part is None else unflat(part).to(world.device) for part in (sent["weight"], sent["bias"]))
    assert weight is not None
    return RemoteTeacher(channels, way, OutputHead(weight, bias, sent["softcap"], sent["scale"]), size)
