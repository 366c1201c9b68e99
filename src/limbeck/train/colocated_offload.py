"""Student and teacher on the same devices, whose memory does not hold both: one is offloaded while the other
computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.strategies.base import Engine
from limbeck.strategies.world import World
from limbeck.teachers.protocol import Teacher


class ColocatedOffload:
    """Offloads the student while the colocated teacher computes. The teacher's signals wait in host memory.

    A run begins with the student on the devices.
    """

    def __init__(self, engine: Engine, teacher: Teacher, world: World) -> None:
        self._engine, self._teacher, self._world = engine, teacher, world

    @contextmanager
    def teacher_turn(self) -> Iterator[None]:
        """Requests that are sent in the block are complete at its end, when the student is back. Collective."""
        self._engine.offload()
        self._world.barrier()
        self._teacher.reload()
        yield
        self._teacher.offload()
        self._engine.reload()
