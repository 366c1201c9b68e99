"""A teacher in Ray workers, of this run or of a teacher service."""

from __future__ import annotations

from limbeck.errors import LimbeckError
from limbeck.teachers.channels.ray_object_store import RayChannel
from limbeck.teachers.protocol import TeacherContext
from limbeck.teachers.remote import RemoteTeacher, connect_channels, route


def connect_to_workers(context: TeacherContext) -> RemoteTeacher:
    """The teacher in Ray workers that the run has started or found (``teacher.source: ray``)."""
    config, world, workers = context.config, context.world, context.workers
    if not workers:
        raise LimbeckError(
            "teacher.source = ray needs workers: give student and teacher different device_mapping, or name a teacher.service."
        )
    seconds = 60 * config.teacher.backend_timeout
    channels = [RayChannel(actor, f"teacher-{rank}", seconds) for rank, actor in enumerate(workers)]
    if config.transfers_directly and world.dims.leads_model_group(world.rank):
        from limbeck.teachers.channels.ray_direct import open_direct_channels

        targets = route(world.data_rank, world.dims.data_size, len(workers), in_step=context.in_step).targets
        direct = open_direct_channels(config.logits_transfer_backend, [channels[rank] for rank in targets])
        for rank, channel in zip(targets, direct, strict=True):
            channels[rank] = channel
    return connect_channels(context, channels)
