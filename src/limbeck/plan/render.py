"""A plan as tables that a person reads."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from limbeck.plan.estimate import RESERVED, Group, Plan

_NAMES = {
    "parameters": "student's parameters (FSDP2: float32 masters)",
    "gradients": "gradients",
    "optimizer": "optimizer state (ZeRO: and float32 masters)",
    "teacher": "teacher (body as its strategy says, head whole)",
    "gathered": "gathered layers and buffers of collectives",
    "signal": "signal, and what the teacher's pass holds",
    "activations": "student's activations and their gradients",
    "loss": "loss: logits of a chunk, gradient of the head",
    "other": "other",
}


_NOTHING = 2**20  # bytes in a step; a few numbers that ranks agree on are not worth a line


def print_plan(console: Console, plan: Plan) -> None:
    """Memory, traffic and time, group by group."""
    for group in plan.groups:
        _print_group(console, plan, group)
    time = Table("time of a step at peak rates")
    time.add_column("ms", justify="right")
    for group in plan.groups:
        for name, seconds in group.seconds.items():
            time.add_row(name if len(plan.groups) == 1 else f"{group.name}: {name}", f"{seconds * 1e3:.1f}")
    time.add_section()
    time.add_row("step, all that can at the same time", f"{plan.overlapped * 1e3:.1f}")
    time.add_row("step, one thing at a time", f"{plan.serial * 1e3:.1f}")
    console.print(time)
    console.print(
        f"At best {plan.tokens_per_second:,.0f} tokens/s: every product at the GPU's dense peak, every wire at its rate."
    )


def _print_group(console: Console, plan: Plan, group: Group) -> None:
    step = group.step
    unit, scale = ("GiB", 2**30) if plan.needed >= 2**30 else ("MiB", 2**20)

    def told(size: float) -> str:
        return f"{size / scale:.2f}"

    models = " and ".join(f"{role} of {_count(size)}" for role, size in step.parameters.items())
    console.print(
        f"{models} on {len(step.devices)} of {plan.nodes} × {plan.gpus_per_node} {plan.gpu.name}; in a step, "
        f"{step.micro_batches} micro-batches of {step.micro_tokens} tokens on a rank, {step.tokens} in all"
    )
    memory = Table(f"memory of {group.place}, {unit}")
    memory.add_column("when fullest", justify="right")
    memory.add_column("at its most", justify="right")
    for name, text in _NAMES.items():
        if step.most.get(name):
            memory.add_row(text, told(step.peak.get(name, 0)), told(step.most[name]))
    memory.add_section()
    memory.add_row("sum", told(step.total), "")
    memory.add_row(f"one {plan.gpu.name}, less {RESERVED:.0%} for CUDA, NCCL and gaps", told(plan.usable), "")
    if step.activations:
        memory.add_section()
        how = "recomputed" if step.recomputed else "kept"
        memory.add_row(f"activations between the passes, {how}", "", told(step.activations))
        memory.add_row(
            f"signal of a micro-batch{'' if step.signal_travels else ' (stays where it is)'}", "", told(step.signal)
        )
        memory.add_row(f"positions in a chunk of the loss: {step.chunk}", "", "")
    console.print(memory)
    if group.traffic:
        traffic = Table(f"received by {group.place} in a step")
        for column in ("ranks", unit, "wire", "ms"):
            traffic.add_column(column, justify="left" if column == "wire" else "right")
        for each in group.traffic:
            if each.bytes < _NOTHING:
                continue
            cells = (str(each.ranks), told(each.bytes), each.wire, f"{each.seconds * 1e3:.1f}")
            traffic.add_row(each.collective.replace("_", "-"), *cells)
        console.print(traffic)


def _count(parameters: int) -> str:
    """So many, in the usual words: 7.62 B, 494.03 M."""
    for word, size in (("B", 1e9), ("M", 1e6)):
        if parameters >= size:
            return f"{parameters / size:.2f} {word}"
    return f"{parameters:,}"
