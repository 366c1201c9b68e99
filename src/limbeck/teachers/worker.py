"""A rank of a teacher as a Ray actor: it loads the model, which is the same ``LocalTeacher`` as without Ray, and
responds to requests.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from limbeck.cluster.actors import Worker, failures_logged
from limbeck.cluster.tensors import PackedTensor, pack
from limbeck.config import DistillConfig
from limbeck.strategies.host_memory import keep_freed_pages
from limbeck.teachers.fingerprint import teacher_fingerprint

if TYPE_CHECKING:  # heavy to import; the program that starts workers imports this file too
    from limbeck.teachers.local import LocalTeacher
    from limbeck.teachers.signals import TeacherRequest

_OOM_REMEDY = "name more devices in teacher.device_mapping with teacher.strategy_args.strategy_name: fsdp2_infer"


class TeacherWorker(Worker):
    """One rank of the teacher. It keeps no state, so Ray can restart it at any time unless it shares a process group."""

    needs = "limbeck.teachers.local"

    def __init__(self, name: str, log: str, values: Mapping[str, Any]) -> None:
        super().__init__(name, log)
        self.config = DistillConfig.model_validate(values)
        self._offloaded, self._responses = False, 0
        self._compiled, self._tokens = False, 0

    @cached_property
    def teacher(self) -> LocalTeacher:
        """Loaded at the first use, which may follow a restart."""
        from limbeck.models import explain_oom
        from limbeck.models.logs import configure_logging
        from limbeck.teachers.local import load_local_teacher

        configure_logging()
        if self.world.device.type == "cpu":
            keep_freed_pages()
        with failures_logged(), explain_oom(f"{self.name} loaded the teacher", _OOM_REMEDY):
            return load_local_teacher(self.config, self.world)

    def load(self) -> tuple[int, int]:
        """Load the teacher; returns the rows of its output head and the number of its parameters."""
        info = self.teacher.info
        return info.vocab_size, info.num_parameters

    def head(self) -> dict[str, Any]:
        """The packed output head."""
        head = self.teacher.model.head
        return {
            "weight": pack(head.weight),
            "bias": None if head.bias is None else pack(head.bias),
            "softcap": head.softcap,
            "scale": head.scale,
        }

    def check(self, longest_row: int, largest_token: int) -> None:
        """Raise LimbeckError unless the teacher can process the data."""
        self.teacher.check(self.config, longest_row, largest_token)

    def fingerprint(self) -> dict[str, Any]:
        """What the signals depend on besides the request; see ``teacher_fingerprint``."""
        return teacher_fingerprint(self.config)

    def respond(self, request: TeacherRequest | None) -> tuple[dict[str, PackedTensor], float]:
        """The packed tensors of a signal and the seconds it took. None runs an empty forward pass."""
        tensors, seconds = self.compute(request)
        begun = time.perf_counter()
        packed = {name: pack(tensor) for name, tensor in tensors.items()}
        return packed, seconds + time.perf_counter() - begun

    def compute(self, request: TeacherRequest | None) -> tuple[dict[str, Tensor], float]:
        """As ``respond``, with tensors on this worker's device."""
        from limbeck.models import explain_oom
        from limbeck.teachers.signals import TeacherRequest

        begun = time.perf_counter()
        given = (TeacherRequest.empty() if request is None else request).to(self.world.device)
        with failures_logged(), explain_oom(f"{self.name} responded", _OOM_REMEDY):
            if self._offloaded:
                self.teacher.move(self.world.device)
                self._offloaded = False
            self._responses += 1
            self._tokens += given.input_ids.numel()
            if not self._compiled:  # a teacher does not know the length of a run, so auto waits until it has been long
                self._compiled = self.teacher.compile(self.config, self._tokens, self.world.device.type)
            return self.teacher.encode(given), time.perf_counter() - begun

    def offload(self) -> None:
        """Free the device until the next request."""
        with failures_logged():
            self.teacher.offload()
        self._offloaded = True
        print(f"{self._responses} responses; the teacher is offloaded", flush=True)
        self._responses = 0
