"""Device numbers turned into places on machines: device d is on machine d // num_gpus_per_node, and Ray finds the machines.

A device is a GPU where the cluster has GPUs, else a CPU slot. Workers that share a device share it by equal parts.
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
    """Where one worker goes. bundle: its machine's part of the placement; gpus: what it takes of a GPU (0 on CPU slots)."""

    bundle: int
    gpus: float


@dataclass(frozen=True)
class Placement:
    """Machines set aside for a run. groups: a place for every device of every group, in the order of its mapping."""

    group: Any
    groups: tuple[tuple[Place, ...], ...]
    device: str

    def free(self) -> None:
        """Give the machines back."""
        load_ray().util.remove_placement_group(self.group)


def layout(
    mappings: Sequence[Sequence[int]], per_node: int | None, on_gpus: bool
) -> tuple[list[dict[str, float]], list[list[Place]]]:
    """What each machine must have, and the place of each worker. ``per_node`` None: all devices are on one machine.

    On GPUs a worker's CPU slots are small change, so that any machine with the GPUs will do.
    """
    workers = Counter(device for mapping in mappings for device in mapping)
    nodes = sorted({0 if per_node is None else device // per_node for device in workers})
    bundles: list[dict[str, float]] = []
    for node in nodes:
        here = [device for device in workers if per_node is None or device // per_node == node]
        # A device that two groups name is one GPU, but two processes.
        bundles.append({"GPU": len(here), "CPU": 1} if on_gpus else {"CPU": sum(workers[device] for device in here)})
    places = [
        [
            Place(0 if per_node is None else nodes.index(device // per_node), 1 / workers[device] if on_gpus else 0.0)
            for device in mapping
        ]
        for mapping in mappings
    ]
    return bundles, places


def unknown_gpu(mappings: Sequence[Sequence[int]], gpus: float) -> str | None:
    """A sentence if the mappings name a GPU beyond the ``gpus`` that there are; with none, devices are CPU slots of any
    number."""
    largest = max(number for mapping in mappings for number in mapping)
    if 0 < gpus <= largest:
        return f"device_mapping names GPU {largest}, but there are {gpus:g} (numbered from 0); correct it, or add machines."
    return None


def describe_device_slots(gpus: float) -> str:
    """What a device_mapping's numbers mean where there are so many GPUs: a GPU that is missing is not missed by silence."""
    return f"Devices: {gpus:g} GPU(s)." if gpus else "Devices: no GPU is found, so device_mapping counts CPU slots."


def describe_devices(mappings: Sequence[Sequence[int]]) -> str:
    """What devices Ray has, in a sentence. Raises LimbeckError if the mappings name others."""
    gpus = load_ray().cluster_resources().get("GPU", 0)
    wrong = unknown_gpu(mappings, gpus)
    if wrong:
        raise LimbeckError(wrong)
    return describe_device_slots(gpus)


def place(
    mappings: Sequence[Sequence[int]], per_node: int | None, look: Callable[[], None] = lambda: None
) -> Placement:
    """Set machines aside for groups of workers, one worker per device of each mapping. ``look`` is called while Ray places
    them; what it raises ends the waiting.

    Raises LimbeckError when the cluster has not got what they need.
    """
    ray = load_ray()
    there = ray.cluster_resources()
    on_gpus = there.get("GPU", 0) > 0
    bundles, places = layout(mappings, per_node, on_gpus)
    device = "GPU" if on_gpus else "CPU"
    wanted = sum(bundle[device] for bundle in bundles)
    if wanted > there.get(device, 0):
        raise LimbeckError(
            f"device_mapping needs {wanted:g} {device} slots, but Ray has {there.get(device, 0):g} in all on "
            f"{len(ray.nodes())} machine(s); name fewer devices, or add machines."
        )
    # SPREAD and not STRICT_SPREAD: after a machine is lost, what is left may have to hold two parts.
    group = ray.util.placement_group(bundles, strategy="SPREAD" if len(bundles) > 1 else "PACK")
    until = time.monotonic() + _PLACING_SECONDS
    try:
        while not (placed := group.wait(1)) and time.monotonic() < until:
            look()
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    if not placed:
        free = ray.available_resources()
        ray.util.remove_placement_group(group)
        parts = " + ".join(f"{bundle[device]:g}" for bundle in bundles)
        raise LimbeckError(
            f"Ray could not place {parts} {device} slots (each number on one machine) within {_PLACING_SECONDS} s: of "
            f"{there.get(device, 0):g} in all, {free.get(device, 0):g} are free; wait for other runs, or set "
            "num_gpus_per_node to what one machine has."
        )
    return Placement(group, tuple(map(tuple, places)), device)
