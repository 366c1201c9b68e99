"""A simulated step on a known GPU: whether it fits, what it sends, and the least time it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError
from limbeck.plan.copied_weights import leaves_copy_open, with_copy
from limbeck.plan.gpus import GPUS, Gpu
from limbeck.plan.micro_batch import longest_row
from limbeck.plan.simulate import Step, simulate
from limbeck.train.build.student import with_recomputation

RESERVED = 0.08
"""Fraction of a GPU's memory that is reserved for the CUDA context, NCCL's buffers and fragmentation."""

_LOCKSTEP = (
    "a copy of the student's weights for writing does not fit, so that the student writes in lockstep; set "
    "rollout.generator_kwargs.copy to choose, or smaller rollout.generator_kwargs.slots."
)
_LONGER_PROMPTS = (
    "teacher.prompt: the teacher's rows are planned as long as the student's, and its own prompts of up to {} tokens may make "
    "them longer."
)

_ADAM_BYTES = (
    28  # per parameter: AdamW reads weight, gradient and two moments, and writes all but the gradient, in float32
)


_BODIES = {True: 0.45, False: 0.24}
_EFFICIENCY = {"loss": 0.64, "optimizer": 0.8, "communication": 1.0}
"""Shares of the peak rates that parts of a step reach: the models' layers compiled or not, and the others. Larger models reach
more."""

MEASURED = "Qwen2.5-0.5B and 1.5B on an H100 (benchmarks/step_gpu.py)"
"""Where these shares come from."""


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in a step: the ranks of its group, the bytes that each receives, the link and its seconds."""

    collective: str
    ranks: int
    bytes: float
    link: str
    seconds: float


@dataclass(frozen=True)
class Group:
    """One rank of a group of processes.

    name: of the group, with the rank if several of its ranks are simulated. seconds: of each part of a step, at peak rates.
    """

    name: str
    step: Step
    traffic: tuple[Traffic, ...]
    seconds: dict[str, float]

    @property
    def place(self) -> str:
        """The simulated rank in words."""
        return f"rank {self.step.rank} of {self.step.role}"

    @property
    def overlapped(self) -> float:
        """Seconds of a step whose communication overlaps with its computation."""
        return _overlapped(self.seconds)

    def expected(self, *, compiled: bool) -> float:
        """The same at the rates that steps were measured to reach."""
        bodies = _BODIES[compiled]
        return _overlapped({part: seconds / _EFFICIENCY.get(part, bodies) for part, seconds in self.seconds.items()})


def _overlapped(seconds: dict[str, float]) -> float:
    communication, optimizer = seconds["communication"], seconds["optimizer"]
    computation = sum(seconds.values()) - communication - optimizer
    return max(computation, communication) + optimizer


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    groups: the simulated ranks. offloads: of roles that share a GPU, one at a time is on it. notices: sentences about how
    the plan differs from the configuration. compiled: whether the layers of the models will be.
    """

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    groups: tuple[Group, ...]
    offloads: bool = False
    notices: tuple[str, ...] = ()
    compiled: bool = True

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a step may fill."""
        return self.gpu.memory * (1 - RESERVED)

    @property
    def needed(self) -> int:
        """Bytes on the fullest GPU. Roles that share it add up, unless they are offloaded."""
        combine = max if self.offloads else sum
        return int(max(self._on(device, lambda group: group.step.total, combine) for device in self._devices))

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU has enough memory."""
        return self.needed <= self.usable

    @property
    def efficiency(self) -> dict[str, float]:
        """The share of the peak rate that ``expected`` assumes for each part of a step."""
        return {"models": _BODIES[self.compiled], **_EFFICIENCY}

    @property
    def overlapped(self) -> float:
        """Seconds of a step whose communication and roles on other GPUs overlap with computation."""
        return max(self._on(device, lambda group: group.overlapped, sum) for device in self._devices)

    @property
    def expected(self) -> float:
        """Seconds of a step at the rates that steps were measured to reach, with communication overlapped."""
        return max(
            self._on(device, lambda group: group.expected(compiled=self.compiled), sum) for device in self._devices
        )

    @property
    def serial(self) -> float:
        """Seconds of a step without any overlap."""
        slowest: dict[str, float] = {}
        for group in self.groups:
            slowest[group.step.role] = max(slowest.get(group.step.role, 0.0), sum(group.seconds.values()))
        return sum(slowest.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together, at most."""
        return self.groups[0].step.tokens / self.overlapped

    @property
    def _devices(self) -> set[int]:
        return {device for group in self.groups for device in group.step.devices}

    def _on(self, device: int, measure: Callable[[Group], float], combine: Callable[[Iterable[float]], float]) -> float:
        """The largest ``measure`` of each role's pipeline stages on ``device``, combined over the roles."""
        largest: dict[str, float] = {}
        for group in self.groups:
            if device in group.step.devices:
                largest[group.step.role] = max(largest.get(group.step.role, measure(group)), measure(group))
        return combine(largest.values())

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values: bytes, FLOPs and seconds of each simulated rank."""
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
            "notices": list(self.notices),
            "fits": self.fits,
            "needed": self.needed,
            "usable": self.usable,
            "step_seconds": {"overlapped": self.overlapped, "serial": self.serial, "expected": self.expected},
            "tokens_per_second": self.tokens_per_second,
            "compiled": self.compiled,
            "efficiency": {**self.efficiency, "measured_with": MEASURED},
            "groups": groups,
        }


def make_plan(config: DistillConfig, nodes: int, gpus_per_node: int, gpu: Gpu, *, compiled: bool | None = None) -> Plan:
    """The plan of ``config`` on ``nodes`` × ``gpus_per_node`` GPUs, whether it fits or not.

    compiled: whether the layers of the models are; by default unless ``compile_model`` is false.

    What the configuration leaves open is as in a run: if ``disable_gradient_checkpointing`` is unset, activations are
    recomputed only if they do not fit otherwise, and the student writes in lockstep only if a copy of its weights does not fit.

    Raises:
        UnknownMemory: if sizes do not determine what the run holds.
        LimbeckError: for a layout that cannot run.
    """
    if nodes < 1 or gpus_per_node < 1:
        raise LimbeckError(f"--nodes {nodes} --gpus-per-node {gpus_per_node} is no GPU; both must be 1 or more.")
    compiled = config.compile_model is not False if compiled is None else compiled

    def plan(changed: DistillConfig) -> Plan:
        return make_plan(changed, nodes, gpus_per_node, gpu, compiled=compiled)

    if leaves_copy_open(config):
        copied = plan(with_copy(config, copy=True))
        if copied.fits:
            return copied
        in_lockstep = plan(with_copy(config, copy=False))
        return replace(in_lockstep, notices=(*in_lockstep.notices, _LOCKSTEP))
    if config.student.model_args.disable_gradient_checkpointing is None:
        kept = plan(with_recomputation(config, recompute=False))
        return kept if kept.fits else plan(with_recomputation(config, recompute=True))
    steps = simulate(config, nodes * gpus_per_node, compiled=compiled)
    used_nodes = {device // gpus_per_node for step in steps for device in step.devices}
    signal_link = "within the node" if len(used_nodes) == 1 else "between nodes"
    ranks = Counter(step.role for step in steps)
    groups = []
    for step in steps:
        name = step.role if ranks[step.role] == 1 else f"{step.role}, rank {step.rank}"
        groups.append(_group(name, step, gpus_per_node, gpu, signal_link))
    _, notice = longest_row(config)
    prompt = config.teacher.prompt if config.has_teacher else None
    if prompt is not None:
        longer = _LONGER_PROMPTS.format(prompt.max_length or config.sequence_length)
    notices = tuple(each for each in (notice, None if prompt is None else longer) if each is not None)
    return Plan(nodes, gpus_per_node, gpu, tuple(groups), config.offloads_colocated, notices, compiled)


def _group(name: str, step: Step, gpus_per_node: int, gpu: Gpu, signal_link: str) -> Group:
    traffic = []
    for (collective, ranks), size in step.sent.items():
        nodes = [step.devices[rank] // gpus_per_node for rank in ranks]
        traffic.append(_traffic(collective, nodes, size, gpu))
    if step.signal_travels and "student" in step.parameters:
        size = step.signal * step.micro_batches
        traffic.append(Traffic("signal", 1, size, signal_link, size / gpu.network))
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
    """On a ring every rank receives all parts but its own, in an all-reduce twice. A message is received whole."""
    count = len(nodes)
    rounds = {"all_reduce": 2, "broadcast": count / (count - 1), "receive": count / (count - 1)}.get(collective, 1)
    received = size * (count - 1) / count * rounds
    on_node = nodes.count(nodes[0])
    if on_node == count:
        return Traffic(collective, count, received, "within the node", received / gpu.link)
    # Each rank of a node has a network adapter; what one receives is passed on within the node.
    return Traffic(collective, count, received, "between nodes", received / min(gpu.link, on_node * gpu.network))


def refusal(plan: Plan) -> LimbeckError:
    """The error of a plan that does not fit, with what may help."""
    fullest = max(plan.groups, key=lambda group: group.step.total)
    largest = max(fullest.step.peak, key=lambda name: fullest.step.peak[name])
    larger = [f"--gpu {gpu.name}" for gpu in _by_memory() if plan.needed <= gpu.memory * (1 - RESERVED)][:1]
    remedies = [_remedy(largest, fullest.step), *larger]
    gib = 2**30
    return LimbeckError(
        f"{fullest.place} needs {plan.needed / gib:.1f} GiB, most of it for {largest}, and one {plan.gpu.name} has "
        f"{plan.usable / gib:.1f} GiB for it; use {' or '.join(remedies)}."
    )


def _by_memory() -> Iterable[Gpu]:
    return sorted(GPUS.values(), key=lambda gpu: gpu.memory)


def _remedy(largest: str, step: Step) -> str:
    if largest == "activations":
        if not step.recomputed:
            return "student.model_args.disable_gradient_checkpointing=false"
        return "fewer tokens in a micro-batch, a larger context_parallel_size"
    if largest == "copy":
        return "rollout.generator_kwargs.copy=false, rollout.offload=true"
    if largest == "cache":
        return "a smaller rollout.generator_kwargs.slots"
    if largest == "teacher copy":
        return "rollout.off_policy=dataset, rollout.offload=true"
    if largest == "teacher":
        return "fsdp2_infer, which shards the teacher, on more GPUs"
    if largest in ("parameters", "gradients", "optimizer"):
        return "more GPUs to shard the student over, lora_target"
    return "a larger tensor_model_parallel_size"
