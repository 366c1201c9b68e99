"""A simulated step on a GPU of the table: does it fit, what is sent, how long can it take at the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError
from limbeck.plan.gpus import GPUS, Gpu
from limbeck.plan.simulate import Simulation, simulate

RESERVED = 0.08
"""Share of a GPU's memory that is left to the CUDA context, NCCL's buffers and the allocator's gaps."""

_ADAM_BYTES = 28  # AdamW reads weight, gradient and two moments and writes all but the gradient, in float32


@dataclass(frozen=True)
class Traffic:
    """One kind of collective: bytes that a rank receives in a step, over how many ranks, on which wire, for how long."""

    collective: str
    ranks: int
    bytes: float
    wire: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The report. seconds: what each part takes at the peak rates; overlapped, serial: the step if communication hides behind
    computation wholly or not at all."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    step: Simulation
    traffic: tuple[Traffic, ...]
    seconds: dict[str, float]

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a step may fill."""
        return self.gpu.memory * (1 - RESERVED)

    @property
    def fits(self) -> bool:
        """Whether the fullest moment is within them."""
        return self.step.total <= self.usable

    @property
    def overlapped(self) -> float:
        """Seconds of a step whose communication hides behind its computation."""
        busy = sum(self.seconds[part] for part in ("teacher", "student", "loss"))
        return max(busy, self.seconds["communication"]) + self.seconds["optimizer"]

    @property
    def serial(self) -> float:
        """Seconds of a step that does one thing at a time."""
        return sum(self.seconds.values())

    def tokens_per_second(self, seconds: float) -> float:
        """Of all ranks together."""
        return self.step.tokens * self.step.micro_batches * self.step.ranks / seconds

    def as_dict(self) -> dict[str, Any]:
        """For machines: bytes, FLOPs and seconds of rank 0."""
        step = self.step
        return {
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "gpu": self.gpu.name,
            "student_parameters": step.student_parameters,
            "teacher_parameters": step.teacher_parameters,
            "rows": step.rows,
            "tokens": step.tokens,
            "micro_batches": step.micro_batches,
            "memory": {
                "fits": self.fits,
                "usable": self.usable,
                "peak": step.total,
                "at_the_peak": step.peak,
                "persistent": step.persistent,
                "recomputes_activations": step.recomputed,
                "activations": {_kept(again): size for again, size in step.activations.items()},
                "peak_if": {_kept(again): size for again, size in step.totals.items()},
                "loss_chunk_rows": step.chunk_rows,
                "signal": step.signal_bytes,
            },
            "traffic": [vars(each) for each in self.traffic],
            "flops": step.flops,
            "seconds": {**self.seconds, "step_overlapped": self.overlapped, "step_serial": self.serial},
            "tokens_per_second": self.tokens_per_second(self.overlapped),
        }


def _kept(recomputed: bool) -> str:
    return "recomputed" if recomputed else "kept"


def make_plan(config: DistillConfig, nodes: int, gpus_per_node: int, gpu: Gpu) -> Plan:
    """The plan of ``config`` on ``nodes`` × ``gpus_per_node``; LimbeckError for a layout that cannot be. See ``Plan.fits``."""
    if nodes < 1 or gpus_per_node < 1:
        raise LimbeckError(f"--nodes {nodes} --gpus-per-node {gpus_per_node} is no GPU at all; both begin at 1.")
    step = simulate(config, nodes * gpus_per_node)
    traffic = tuple(_traffic(kind, ranks, size, gpus_per_node, gpu) for (kind, ranks), size in step.sent.items())
    seconds = {name: count / gpu.flops for name, count in step.flops.items()}
    seconds["loss"] += step.logits * step.logit_bytes / gpu.bandwidth
    seconds["optimizer"] = step.updated * _ADAM_BYTES / gpu.bandwidth
    seconds["communication"] = sum(each.seconds for each in traffic)
    return Plan(nodes, gpus_per_node, gpu, step, traffic, seconds)


def _traffic(kind: str, ranks: tuple[int, ...], size: int, gpus_per_node: int, gpu: Gpu) -> Traffic:
    """A ring: every rank receives all but its own part; an all-reduce is a reduce-scatter and an all-gather."""
    count = len(ranks)
    received = size * (count - 1) / count * (2 if kind == "all_reduce" else 1)
    here = sum(rank // gpus_per_node == ranks[0] // gpus_per_node for rank in ranks)
    if here == count:
        return Traffic(kind, count, received, "within the node", received / gpu.link)
    # The ranks of a node each have an adapter, and what comes in through one is passed on inside.
    return Traffic(kind, count, received, "between nodes", received / min(gpu.link, here * gpu.network))


def refusal(config: DistillConfig, plan: Plan) -> LimbeckError:
    """Why a plan does not fit, and what would; alternatives of another size have been simulated too."""
    step, gib = plan.step, 2**30
    ways = []
    if not step.recomputed and step.totals[True] <= plan.usable:
        ways.append(f"student.model_args.disable_gradient_checkpointing=false ({step.totals[True] / gib:.1f} GiB)")
    for gpu in sorted(GPUS.values(), key=lambda each: each.memory):
        if step.total <= gpu.memory * (1 - RESERVED):
            ways.append(f"--gpu {gpu.name}")
            break
    if not ways or step.ranks < 8:
        ways += _more_ranks(config, plan) or _fewer_rows(config, plan)
    if not ways and config.teacher.strategy_args.strategy_name == "hf_infer":
        ways.append("teacher.strategy_args.strategy_name=fsdp2_infer, which shards the teacher's body")
    answer = f"what fits: {', or '.join(ways)}" if ways else "shard over all ranks, take LoRA or smaller models"
    return LimbeckError(
        f"rank 0 needs {step.total / gib:.1f} GiB on {plan.nodes} × {plan.gpus_per_node} {plan.gpu.name}, of which "
        f"{plan.usable / gib:.1f} GiB can be filled; {answer}."
    )


def _more_ranks(config: DistillConfig, plan: Plan) -> list[str]:
    """The smallest doubling that fits, if what is sharded is what is too much."""
    sharded = sum(plan.step.persistent.values()) + plan.step.peak.get("teacher", 0)
    nodes, per_node = plan.nodes, plan.gpus_per_node
    while nodes * per_node < 4096:
        nodes, per_node = (nodes, per_node * 2) if nodes == 1 and per_node < 8 else (nodes * 2, per_node)
        ranks = nodes * per_node
        if plan.step.total - sharded * (1 - plan.step.ranks / ranks) > plan.usable:
            continue
        total = simulate(config, ranks).total
        if total <= plan.usable:
            return [f"--nodes {nodes} --gpus-per-node {per_node} ({total / 2**30:.1f} GiB)"]
    return []


def _fewer_rows(config: DistillConfig, plan: Plan) -> list[str]:
    rows = plan.step.rows
    if config.max_tokens_per_microbatch or rows == 1:
        return []
    training = config.student.training_args.model_copy(update={"per_device_train_batch_size": 1})
    total = simulate(
        config.model_copy(update={"student": config.student.model_copy(update={"training_args": training})}),
        plan.step.ranks,
    ).total
    if total > plan.usable:
        return []
    return [f"student.training_args.per_device_train_batch_size=1 ({total / 2**30:.1f} GiB)"]
