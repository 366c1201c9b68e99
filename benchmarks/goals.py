"""The goals of Limbeck, and whether results keep them: on one GPU (``step_gpu.py``, ``loss_gpu.py``), and beside Megatron on
CPUs (``megatron_step.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Goal(NamedTuple):
    """``what`` is at least or at most ``limit``."""

    what: str
    sign: str
    limit: float


SPEED_LIGER = Goal("tokens/s ÷ TRL + Liger's", "≥", 2.5)
SPEED_TRL = Goal("tokens/s ÷ TRL's", "≥", 3.5)
MEMORY_LIGER = Goal("peak memory ÷ TRL + Liger's", "≤", 0.35)
STEP = Goal("step ÷ its matrix products", "≤", 1.4)
PACKED = Goal("tokens/s of packed ÷ full rows", "≥", 0.9)
COLD = Goal("seconds of the first step, cold", "≤", 60)
KEPT_CACHE = Goal("seconds of the first step, compiler cache kept", "≤", 20)
SHARE = Goal("share of the matmul peak", "≥", 0.5)
LOSS = Goal("loss ÷ aligned products, per logit", "≤", 1.12)
GROWTH = Goal("growth of memory in the loss, GB", "≤", 1.2)
LOSS_LIGER = Goal("loss ÷ Liger's", "≤", 0.6)
MEGATRON_PARTS = Goal("step ÷ its parts", "≤", 1.05)
MEGATRON_SPEED = Goal("steps/s ÷ ModelOpt's", "≥", 1.3)
MEGATRON_MEMORY = Goal("growth of peak memory ÷ ModelOpt's", "≤", 0.6)

SMALL, LARGE = "0.5B<-1.5B", "1.5B<-7B"


def compare(goal: Goal, value: float, case: str) -> dict[str, Any]:
    """A result: the goal, the value of this ``case`` and whether the goal is kept."""
    kept = value >= goal.limit if goal.sign == "≥" else value <= goal.limit
    return {"case": case, "goal": goal.what, "value": value, "limit": f"{goal.sign} {goal.limit}", "kept": kept}


def step_goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals for which ``step_gpu.py`` has run the sides: those of the smaller models, and the larger ones' share of the
    peak.
    """
    measured = {(r["shape"], r["rows"], r["side"]): r for r in results if "seconds" in r}
    compared = []

    def divide(goal: Goal, one: tuple[str, str], other: tuple[str, str], key: str) -> None:
        ours, theirs = (measured.get((SMALL, *case), {}).get(key) for case in (one, other))
        if ours and theirs:
            compared.append(compare(goal, ours / theirs, f"{SMALL} {one[0]}"))

    full, packed = ("full", "limbeck"), ("packed", "limbeck")
    divide(SPEED_LIGER, full, ("full", "liger"), "tokens_per_second")
    divide(SPEED_TRL, full, ("full", "trl"), "tokens_per_second")
    divide(MEMORY_LIGER, full, ("full", "liger"), "peak_gb")
    divide(STEP, full, ("full", "products"), "seconds")
    divide(PACKED, packed, full, "tokens_per_second")
    ours = [r for (shape, _, side), r in measured.items() if (shape, side) == (SMALL, "limbeck")]
    # A side's caches are empty for its first kind of rows.
    for goal, result in zip((COLD, KEPT_CACHE), ours, strict=False):
        compared.append(compare(goal, result["first_step_seconds"], f"{SMALL} {result['rows']}"))
    share = measured.get((LARGE, *full), {}).get("matmul_share")
    if share:
        compared.append(compare(SHARE, share, f"{LARGE} full"))
    return compared


def loss_goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of the sizes that ``loss_gpu.py`` has measured."""
    compared = []
    for result in results:
        case = f"{result['hidden_student']}/{result['hidden_teacher']}, vocabulary {result['vocab']}, {result['what']}"
        if "of_aligned_products_per_logit" in result:
            compared.append(compare(LOSS, result["of_aligned_products_per_logit"], case))
            compared.append(compare(GROWTH, result["growth_gb"], case))
        elif "limbeck_of_it" in result:
            compared.append(compare(LOSS_LIGER, result["limbeck_of_it"], case))
    return compared


def lines(compared: list[dict[str, Any]]) -> list[str]:
    """One line for each of the goals."""
    return [
        f"       {each['case']}, {each['goal']}: {each['value']:.2f}, goal {each['limit']}, "
        f"kept: {'yes' if each['kept'] else 'NO'}"
        for each in compared
    ]
