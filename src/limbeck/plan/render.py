"""Prints a plan as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from limbeck.plan.estimate import MEASURED, RESERVED, Group, Plan

_NAMES = {
    "parameters": "student's parameters (FSDP2: float32 masters)",
    "gradients": "gradients",
    "optimizer": "optimizer state (ZeRO: and float32 masters)",
    "copy": "copy of the student's weights for writing",
    "teacher copy": "copy of the teacher for writing",
    "cache": "cache of keys and values for writing",
    "teacher": "teacher (its part of the body, the whole head)",
    "gathered": "gathered layers and buffers of collectives",
    "signal": "signal and activations of the teacher's pass",
    "activations": "student's activations and their gradients",
    "loss": "loss: logits of a chunk, gradient of the head",
    "other": "other",
}

_SMALL = 2**20  # bytes in a step; single numbers that ranks exchange get no line


def print_plan(console: Console, plan: Plan) -> None:
    """Print memory, traffic and time of each group."""
    for group in plan.groups:
        _print_group(console, plan, group)
    time = Table("time of a step at peak rates")
    time.add_column("ms", justify="right")
    for group in plan.groups:
        for name, seconds in group.seconds.items():
            time.add_row(name if len(plan.groups) == 1 else f"{group.name}: {name}", f"{seconds * 1e3:.1f}")
    time.add_section()
    time.add_row("step with full overlap", f"{plan.overlapped * 1e3:.1f}")
    time.add_row("step without overlap", f"{plan.serial * 1e3:.1f}")
    time.add_row("step as measured steps run, roughly", f"{plan.expected * 1e3:.0f}")
    console.print(time)
    shares = plan.efficiency
    console.print(
        f"At most {plan.tokens_per_second:,.0f} tokens/s: matrix products at the GPU's dense peak, links at their full rate. "
        f"Measured steps take longer: the last line assumes the shares of these rates that were measured with {MEASURED}, "
        f"{shares['models']} for models whose layers are {'compiled' if plan.compiled else 'not compiled'}, {shares['loss']} "
        f"for the loss and {shares['optimizer']} for the optimizer."
    )


def _print_group(console: Console, plan: Plan, group: Group) -> None:
    step = group.step
    unit, scale = ("GiB", 2**30) if plan.needed >= 2**30 else ("MiB", 2**20)

    def scaled(size: float) -> str:
        return f"{size / scale:.2f}"

    models = " and ".join(f"{role} of {_count(size)}" for role, size in step.parameters.items())
    console.print(
        f"{models} on {len(step.devices)} of {plan.nodes} × {plan.gpus_per_node} {plan.gpu.name}; in a step, "
        f"{step.micro_batches} micro-batches of {step.micro_tokens} tokens on a rank, {step.tokens} in all"
    )
    memory = Table(f"memory of {group.place}, {unit}")
    memory.add_column("at the peak", justify="right")
    memory.add_column("at most", justify="right")
    for name, text in _NAMES.items():
        if step.most.get(name):
            memory.add_row(text, scaled(step.peak.get(name, 0)), scaled(step.most[name]))
    memory.add_section()
    memory.add_row("sum", scaled(step.total), "")
    memory.add_row(
        f"one {plan.gpu.name}, less {RESERVED:.0%} for CUDA, NCCL and the allocator", scaled(plan.usable), ""
    )
    if step.activations:
        memory.add_section()
        how = "recomputed" if step.recomputed else "kept"
        memory.add_row(f"activations between the passes, {how}", "", scaled(step.activations))
        memory.add_row(
            f"signal of a micro-batch{'' if step.signal_travels else ' (not transferred)'}", "", scaled(step.signal)
        )
        memory.add_row(f"positions in a chunk of the loss: {step.chunk}", "", "")
    console.print(memory)
    if group.traffic:
        traffic = Table(f"received by {group.place} in a step")
        for column in ("ranks", unit, "link", "ms"):
            traffic.add_column(column, justify="left" if column == "link" else "right")
        for each in group.traffic:
            if each.bytes < _SMALL:
                continue
            cells = (str(each.ranks), scaled(each.bytes), each.link, f"{each.seconds * 1e3:.1f}")
            traffic.add_row(each.collective.replace("_", "-"), *cells)
        console.print(traffic)


def _count(parameters: int) -> str:
    """A number of parameters in short: 7.62 B, 494.03 M."""
    for word, size in (("B", 1e9), ("M", 1e6)):
        if parameters >= size:
            return f"{parameters / size:.2f} {word}"
    return f"{parameters:,}"
