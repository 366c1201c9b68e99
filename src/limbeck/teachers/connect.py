"""The teacher as a student's worker sees it: actors of Ray that answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.cluster.groups import result
from limbeck.cluster.tensors import unflat
from limbeck.config import DistillConfig
from limbeck.objectives import OutputHead
from limbeck.strategies.world import World
from limbeck.teachers import Channel, RemoteTeacher, route
from limbeck.teachers.channels.ray_object_store import RayChannel
from limbeck.train.build.data import Data
from limbeck.train.build.models import layout_of, signal_spec


def remote_teacher(
    actors: Sequence[Any], in_step: bool, config: DistillConfig, world: World, data: Data
) -> RemoteTeacher:
    seconds = 60 * config.teacher.backend_timeout
    # Ranks that share their rows have one question, which the first of them puts for all.
    layout = layout_of(config.student)
    way = route(world.data_rank, world.data_size, len(actors), in_step=in_step)
    channels: list[Channel] = [RayChannel(actor, f"teacher-{rank}", seconds) for rank, actor in enumerate(actors)]
    first = actors[way.mine[0]]
    name = f"teacher-{way.mine[0]}"
    if data.translator is None:  # which keeps to what the teacher's configuration says
        result(first.check.remote(data.longest_row, data.largest_token), name, seconds)
    size, vocab = result(first.load.remote(), name, seconds)
    head = None
    if signal_spec(config, vocab).needs_head:
        sent = result(first.head.remote(), name, seconds)
        weight, bias = (
            None if part is None else unflat(part).to(world.device) for part in (sent["weight"], sent["bias"])
        )
        assert weight is not None
        head = OutputHead(weight, bias, sent["softcap"], sent["scale"])
    if config.transfers_directly and world.rank % layout.together == 0:
        from limbeck.teachers.channels.ray_direct import connect

        names = [f"teacher-{rank}" for rank in way.mine]
        backend = config.logits_transfer_backend
        for rank, channel in zip(
            way.mine, connect(backend, [actors[rank] for rank in way.mine], names, seconds), strict=True
        ):
            channels[rank] = channel

    def rest() -> None:
        for rank, ref in enumerate([actor.rest.remote() for actor in actors]):
            result(ref, f"teacher-{rank}", seconds)

    return RemoteTeacher(channels, way, vocab, size, head, layout.together_group(world), rest)
