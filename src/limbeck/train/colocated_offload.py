"""Student and teacher on the same devices, which do not hold both: they take turns.

While the teacher answers, what the student keeps on its devices lies in the machines' memory, and the other way round. The
answers lie there in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.strategies.torch_engine import TorchEngine
from limbeck.strategies.world import World
from limbeck.teachers import RemoteTeacher


class ColocatedOffload:
    """Sees to it that student and teacher are never on the devices together, from the student's side.

    Every rank of the student must enter ``teachers`` at the same moments. The teacher comes when it is asked something, and a
    run begins with the student on the devices.
    """

    def __init__(self, engine: TorchEngine, teacher: RemoteTeacher, world: World) -> None:
        self._engine, self._teacher, self._world = engine, teacher, world

    @contextmanager
    def teachers(self) -> Iterator[None]:
        """The teacher's turn: what is asked in the block is answered at its end, and the student is back."""
        self._engine.offload()
        self._world.wait()
        yield
        self._teacher.wait()
        self._world.wait()
        if self._world.is_main:
            self._teacher.rest()
        self._world.wait()
        self._engine.reload()
