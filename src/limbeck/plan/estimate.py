"""A simulated step on a GPU of the table: does it fit, what is sent, how long does it take at the least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError
from limbeck.plan.gpus import GPUS, Gpu
from limbeck.plan.simulate import Step, simulate

RESERVED = 0.08
"""Share of a GPU's memory that is left to the CUDA context, NCCL's buffers and the allocator's gaps."""

_ADAM_BYTES = 28  # a number: AdamW reads weight, gradient and two moments and writes all but the gradient, in float32


@dataclass(frozen=True)
class Traffic:
    """One kind of collective: bytes that a rank receives in a step, over how many ranks, on which wire, for how long."""

    collective: str
    ranks: int
    bytes: float
    wire: str
    seconds: float


@dataclass(frozen=True)
class Group:
    """A group of processes, seen from one rank of it. name: of the group, and of that rank's place in a pipeline. seconds: what
    each part of its step takes at the peak rates."""

    name: str
    step: Step
    traffic: tuple[Traffic, ...]
    seconds: dict[str, float]

    @property
    def place(self) -> str:
        """The rank that is looked at, in words."""
        return f"rank {self.step.rank} of {self.step.role}"

    @property
    def overlapped(self) -> float:
        """Seconds of a step whose communication hides behind its computation."""
        aside = self.seconds["communication"], self.seconds["optimizer"]
        return max(sum(self.seconds.values()) - sum(aside), aside[0]) + aside[1]


@dataclass(frozen=True)
class Plan:
    """The report on all groups of a run. turns: groups that share a GPU are never on it together."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    groups: tuple[Group, ...]
    turns: bool = False

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a step may fill."""
        return self.gpu.memory * (1 - RESERVED)

    @property
    def needed(self) -> int:
        """Bytes on the fullest GPU; groups that share one add up, unless they take turns."""
        together = max if self.turns else sum
        return int(max(self._on(device, lambda group: group.step.total, together) for device in self._devices))

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU holds what it must."""
        return self.needed <= self.usable

    @property
    def overlapped(self) -> float:
        """Seconds of a step in which only what must waits: groups on GPUs of their own work at the same time."""
        return max(self._on(device, lambda group: group.overlapped, sum) for device in self._devices)

    @property
    def serial(self) -> float:
        """Seconds of a step that does one thing at a time."""
        slowest: dict[str, float] = {}
        for group in self.groups:
            slowest[group.step.role] = max(slowest.get(group.step.role, 0.0), sum(group.seconds.values()))
        return sum(slowest.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together, at best."""
        return self.groups[0].step.tokens / self.overlapped

    @property
    def _devices(self) -> set[int]:
        return {device for group in self.groups for device in group.step.devices}

    def _on(self, device: int, of: Callable[[Group], float], together: Callable[[Iterable[float]], float]) -> float:
        """``of`` the groups on ``device`` together; of those that are stages of one pipeline, the largest."""
        largest: dict[str, float] = {}
        for group in self.groups:
            if device in group.step.devices:
                largest[group.step.role] = max(largest.get(group.step.role, of(group)), of(group))
        return together(largest.values())

    def as_dict(self) -> dict[str, Any]:
        """For machines: bytes, FLOPs and seconds of rank 0 of each group."""
        groups = []
        for group in self.groups:
            values = asdict(group.step) | {
                "total": group.step.total,
                "traffic": [asdict(each) for each in group.traffic],
            }
            del values["sent"]
            groups.append({"name": group.name, **values, "seconds": group.seconds})
        return {
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "gpu": asdict(self.gpu),
            "fits": self.fits,
            "needed": self.needed,
            "usable": self.usable,
            "step_seconds": {"overlapped": self.overlapped, "serial": self.serial},
            "tokens_per_second": self.tokens_per_second,
            "groups": groups,
        }


def make_plan(config: DistillConfig, nodes: int, gpus_per_node: int, gpu: Gpu) -> Plan:
    """The plan of ``config`` on ``nodes`` × ``gpus_per_node``; LimbeckError for a layout that cannot be. See ``Plan.fits``."""
    if nodes < 1 or gpus_per_node < 1:
        raise LimbeckError(f"--nodes {nodes} --gpus-per-node {gpus_per_node} is no GPU at all; both begin at 1.")
    steps = simulate(config, nodes * gpus_per_node)
    everywhere = {device // gpus_per_node for step in steps for device in step.devices}
    apart = "within the node" if len(everywhere) == 1 else "between nodes"
    looked_at = Counter(step.role for step in steps)
    names = [step.role if looked_at[step.role] == 1 else f"{step.role}, rank {step.rank}" for step in steps]
    groups = tuple(_group(name, step, gpus_per_node, gpu, apart) for name, step in zip(names, steps, strict=True))
    return Plan(nodes, gpus_per_node, gpu, groups, config.offloads_colocated)


def _group(name: str, step: Step, gpus_per_node: int, gpu: Gpu, apart: str) -> Group:
    traffic = []
    for (collective, ranks), size in step.sent.items():
        nodes = [step.devices[rank] // gpus_per_node for rank in ranks]
        traffic.append(_traffic(collective, nodes, size, gpu))
    if step.signal_travels and "student" in step.parameters:
        size = step.signal * step.micro_batches
        traffic.append(Traffic("signal", 1, size, apart, size / gpu.network))
    seconds = {part: count / gpu.flops for part, count in step.flops.items() if count}
    if "loss" in seconds:
        seconds["loss"] += step.moved / gpu.bandwidth
    waits = sum(times * seconds.get(part, 0.0) for part, times in step.waits.items())
    if waits:
        seconds["waiting for other stages"] = waits
    seconds["optimizer"] = step.stepped * _ADAM_BYTES / gpu.bandwidth
    seconds["communication"] = sum(each.seconds for each in traffic)
    return Group(name, step, tuple(traffic), seconds)


def _traffic(collective: str, nodes: list[int], size: int, gpu: Gpu) -> Traffic:
    """On a ring every rank receives all but its own part, and in an all-reduce twice; of a message, all."""
    count = len(nodes)
    rounds = {"all_reduce": 2, "broadcast": count / (count - 1), "receive": count / (count - 1)}.get(collective, 1)
    received = size * (count - 1) / count * rounds
    here = nodes.count(nodes[0])
    if here == count:
        return Traffic(collective, count, received, "within the node", received / gpu.link)
    # The ranks of a node each have an adapter, and what comes in through one is passed on inside.
    return Traffic(collective, count, received, "between nodes", received / min(gpu.link, here * gpu.network))


def refusal(plan: Plan) -> LimbeckError:
    """Why a plan does not fit, and what might."""
    fullest = max(plan.groups, key=lambda group: group.step.total)
    largest = max(fullest.step.peak, key=lambda name: fullest.step.peak[name])
    ways = [f"--gpu {gpu.name}" for gpu in _by_memory() if plan.needed <= gpu.memory * (1 - RESERVED)][:1]
    remedy = _remedy(largest, fullest.step)
    gib = 2**30
    return LimbeckError(
        f"one {plan.gpu.name} can hold {plan.usable / gib:.1f} GiB, and {fullest.place} needs "
        f"{plan.needed / gib:.1f} GiB, most of it for {largest}; use {' or '.join([remedy, *ways])}."
    )


def _by_memory() -> Iterable[Gpu]:
    return sorted(GPUS.values(), key=lambda gpu: gpu.memory)


def _remedy(largest: str, step: Step) -> str:
    if largest == "activations":
        if not step.recomputed:
            return "student.model_args.disable_gradient_checkpointing=false"
        return "fewer tokens in a micro-batch, a larger context_parallel_size"
    if largest == "teacher":
        return "fsdp2_infer, which shards the teacher, on more GPUs"
    if largest in ("parameters", "gradients", "optimizer"):
        return "more GPUs to shard the student over, lora_target"
    return "a larger tensor_model_parallel_size"
