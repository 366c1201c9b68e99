"""A plan as tables that a person reads."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from limbeck.plan.estimate import RESERVED, Plan

_NAMES = {
    "parameters": "student's parameters (float32 masters, sharded)",
    "gradients": "gradients (sharded)",
    "optimizer": "optimizer state (sharded)",
    "teacher": "teacher (body as its strategy says, head whole)",
    "gathered": "gathered layers and buffers of collectives",
    "teacher's pass": "signal and what the teacher's pass holds",
    "activations": "student's activations and their gradients",
    "loss": "loss: logits of a chunk, gradient of the head",
    "other": "other",
}


def print_plan(console: Console, plan: Plan) -> None:
    """Memory, traffic and time, each with its assumption below it."""
    step = plan.step
    console.print(
        f"{step.teacher_parameters / 1e9:.2f} B teaches {step.student_parameters / 1e9:.2f} B"
        if step.teacher_parameters
        else f"{step.student_parameters / 1e9:.2f} B alone",
        f"on {plan.nodes} × {plan.gpus_per_node} {plan.gpu.name}; a rank's step: {step.micro_batches} micro-batches of "
        f"{step.tokens} tokens, all supervised",
    )
    memory = Table("memory of rank 0 at its fullest moment", title_justify="left")
    memory.add_column("GiB", justify="right")
    for name, text in _NAMES.items():
        if name in step.peak:
            memory.add_row(text, _gib(step.peak[name]))
    memory.add_section()
    memory.add_row("sum", _gib(step.total))
    memory.add_row(f"one {plan.gpu.name}, less {RESERVED:.0%} for CUDA, NCCL and gaps", _gib(plan.usable))
    console.print(memory)

    parts = Table("what a step needs, whenever")
    parts.add_column("GiB", justify="right")
    for name in ("parameters", "gradients", "optimizer"):
        parts.add_row(_NAMES[name], _gib(step.persistent[name]))
    for again, text in ((True, "recomputed"), (False, "kept")):
        used = " (as configured)" if again == step.recomputed else ""
        parts.add_row(f"activations between the passes, {text}{used}", _gib(step.activations[again]))
        parts.add_row(f"  fullest moment then{used}", _gib(step.totals[again]))
    parts.add_row("signal of a micro-batch", _gib(step.signal_bytes))
    console.print(parts)

    if plan.traffic:
        traffic = Table("received by a rank in a step")
        for column in ("ranks", "GiB", "wire", "ms"):
            traffic.add_column(column, justify="left" if column == "wire" else "right")
        for each in plan.traffic:
            cells = (str(each.ranks), _gib(each.bytes), each.wire, f"{each.seconds * 1e3:.1f}")
            traffic.add_row(each.collective.replace("_", "-"), *cells)
        traffic.add_row("signal (stays on its rank)", "1", "0.00", "none", "0.0")
        console.print(traffic)

    time = Table("time of a step at peak rates")
    time.add_column("ms", justify="right")
    for name, seconds in plan.seconds.items():
        time.add_row(name, f"{seconds * 1e3:.1f}")
    time.add_section()
    time.add_row("step, communication behind computation", f"{plan.overlapped * 1e3:.1f}")
    time.add_row("step, one thing at a time", f"{plan.serial * 1e3:.1f}")
    console.print(time)
    console.print(
        f"At best {plan.tokens_per_second(plan.overlapped):,.0f} tokens/s. This is a lower bound: every product at the GPU's "
        "dense peak, every wire at its rate.",
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
