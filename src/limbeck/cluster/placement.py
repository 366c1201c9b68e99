"""Turns device numbers into places on machines: device d is on machine d // num_gpus_per_node, and Ray chooses the
machines.

A device is a GPU where the cluster has GPUs, else a CPU slot. Workers on the same device share it in equal parts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.cluster.session import load_ray
from limbeck.errors import LimbeckError

_PLACING_SECONDS = 60


@dataclass(frozen=True)
class Place:
    """Where one worker runs. bundle: its machine's part of the placement; gpus: its share of a GPU (0 on CPU slots)."""

    bundle: int
    gpus: float


@dataclass(frozen=True)
class Placement:
    """Machines reserved for a run. groups: a place for every device of every mapping, in order; device: "GPU" or
    "CPU".
    """

    group: Any
    groups: tuple[tuple[Place, ...], ...]
    device: str

    def free(self) -> None:
        """Release the machines."""
        load_ray().util.remove_placement_group(self.group)


def plan_placement(
    mappings: Sequence[Sequence[int]], per_node: int | None, on_gpus: bool, extra: Sequence[int] = ()
) -> tuple[list[dict[str, float]], list[list[Place]]]:
    """The resources that each machine must have, and the place of each worker. ``per_node`` None: all devices are on
    one machine. extra: number of further devices of each worker of the first mapping, for processes that it starts.

    On GPUs a machine needs one CPU slot only, so that any machine with the GPUs fits.
    """
    more = dict(zip(mappings[0], extra or [0] * len(mappings[0]), strict=True))
    workers = Counter(device for mapping in mappings for device in mapping)
    nodes = sorted({0 if per_node is None else device // per_node for device in workers})
    bundles: list[dict[str, float]] = []
    for node in nodes:
        here = [device for device in workers if per_node is None or device // per_node == node]
        # A device that two groups name is one GPU, but two processes.
        own = sum(more.get(device, 0) for device in here)
        slots = sum(workers[device] for device in here) + own
        bundles.append({"GPU": len(here) + own, "CPU": 1} if on_gpus else {"CPU": slots})
    places = [
        [
            Place(
                0 if per_node is None else nodes.index(device // per_node),
                1 / workers[device] + (more[device] if number == 0 else 0) if on_gpus else 0.0,
            )
            for device in mapping
        ]
        for number, mapping in enumerate(mappings)
    ]
    return bundles, places


def unknown_gpu(mappings: Sequence[Sequence[int]], gpus: float) -> str | None:
    """A sentence if the mappings name a GPU beyond the number ``gpus``; without GPUs, devices are CPU slots of any
    number.
    """
    largest = max(number for mapping in mappings for number in mapping)
    if 0 < gpus <= largest:
        return f"device_mapping names GPU {largest}, but there are {gpus:g} (numbered from 0); correct it, or add machines."
    return None


def describe_device_slots(gpus: float) -> str:
    """What the numbers of a device_mapping mean with this number of GPUs."""
    return f"Devices: {gpus:g} GPU(s)." if gpus else "Devices: no GPU was found, so device_mapping counts CPU slots."


def describe_devices(mappings: Sequence[Sequence[int]]) -> str:
    """The devices that Ray has, in a sentence. Raises LimbeckError if the mappings name others."""
    gpus = load_ray().cluster_resources().get("GPU", 0)
    wrong = unknown_gpu(mappings, gpus)
    if wrong:
        raise LimbeckError(wrong)
    return describe_device_slots(gpus)


def place(
    mappings: Sequence[Sequence[int]],
    per_node: int | None,
    poll: Callable[[], None] = lambda: None,
    extra: Sequence[int] = (),
) -> Placement:
    """Reserve machines for groups of workers, one worker per device of each mapping. ``poll`` is called while Ray
    places them; an exception that it raises ends the wait. extra: see ``plan_placement``.

    Raises LimbeckError if the cluster lacks the resources.
    """
    ray = load_ray()
    total = ray.cluster_resources()
    on_gpus = total.get("GPU", 0) > 0
    bundles, places = plan_placement(mappings, per_node, on_gpus, extra)
    device = "GPU" if on_gpus else "CPU"
    needed = sum(bundle[device] for bundle in bundles)
    if needed > total.get(device, 0):
        raise LimbeckError(
            f"device_mapping needs {needed:g} {device} slots, but Ray has {total.get(device, 0):g} in all on "
            f"{len(ray.nodes())} machine(s); name fewer devices, or add machines."
        )
    # SPREAD and not STRICT_SPREAD: after a machine is lost, what is left may have to hold two parts.
    group = ray.util.placement_group(bundles, strategy="SPREAD" if len(bundles) > 1 else "PACK")
    until = time.monotonic() + _PLACING_SECONDS
    try:
        while not (placed := group.wait(1)) and time.monotonic() < until:
            poll()
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    if not placed:
        free = ray.available_resources()
        ray.util.remove_placement_group(group)
        parts = " + ".join(f"{bundle[device]:g}" for bundle in bundles)
        raise LimbeckError(
            f"Ray could not place {parts} {device} slots (each number on one machine) within {_PLACING_SECONDS} s: of "
            f"{total.get(device, 0):g} in all, {free.get(device, 0):g} are free; wait for other runs, or set "
            "num_gpus_per_node to what one machine has."
        )
    return Placement(group, tuple(map(tuple, places)), device)
