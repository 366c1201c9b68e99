"""Generates grade-school word problems with worked answers from a seed.

A story is a text with placeholders and one to three operations. Numbers are drawn until every operation is easy (``_easy``,
results from 2 to 99), so each answer is correct by construction and can be checked step by step.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer, such as ``12 + 7 = 19 apples. 19 - 5 = 14 apples. #### 14``."""

    question: str
    answer: str


@dataclass(frozen=True)
class _Story:
    """A text with placeholders for names, things and the numbers a to d. Its steps name their results x, y and z.

    Numbers are at most 19, those named in ``large`` at most 99.
    """

    text: str
    steps: tuple[str, ...]
    large: str = ""


_STORIES = (
    _Story(
        "{name} has {a} {things}. {friend} gives {name} {b} more {things}. How many {things} does {name} have now?",
        ("a + b {things}",),
    ),
    _Story(
        "{name} has {a} {things} and gives {b} {things} to {friend}. How many {things} does {name} have left?",
        ("a - b {things}",),
    ),
    _Story(
        "{name} buys {a} {things}. Each of the {things} costs {b} dollars. How many dollars does {name} pay?",
        ("a * b dollars",),
    ),
    _Story(
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        ("a / b {things}",),
        large="a",
    ),
    _Story(
        "{name} walks {a} miles each hour. How many miles does {name} walk in {b} hours?",
        ("a * b miles",),
    ),
    _Story(
        "{name} is {a} years old. {friend} is {b} years older than {name}. How old is {friend} in {c} years?",
        ("a + b years", "x + c years"),
    ),
    _Story(
        "{name} has {a} {things}. {friend} has {b} fewer {things} than {name}. "
        "How many {things} do they have together?",
        ("a - b {things}", "a + x {things}"),
    ),
    _Story(
        "{name} has {a} {things}, finds {b} more {things} and loses {c}. How many {things} does {name} have left?",
        ("a + b {things}", "x - c {things}"),
    ),
    _Story(
        "{name} has {a} boxes with {b} {things} in each box, and {c} more {things}. How many {things} are there?",
        ("a * b {things}", "x + c {things}"),
    ),
    _Story(
        "{name} has {a} dollars and buys {b} {things} for {c} dollars each. How many dollars does {name} have left?",
        ("b * c dollars", "a - x dollars"),
        large="a",
    ),
    _Story(
        "{name} has {a} {things} and {friend} has {b} {things}. They pack all the {things} into {c} boxes. "
        "How many {things} are in each box?",
        ("a + b {things}", "x / c {things}"),
    ),
    _Story(
        "{name} has {a} {things}. {friend} has {b} times as many. {friend} loses {c} {things}. "
        "How many {things} does {friend} have left?",
        ("a * b {things}", "x - c {things}"),
    ),
    _Story(
        "A book has {a} pages. {name} reads {b} pages each day for {c} days. How many pages are left?",
        ("b * c pages", "a - x pages"),
        large="a",
    ),
    _Story(
        "{name} sells {a} {things} and {friend} sells {b} {things} for {c} dollars each. They spend {d} dollars. "
        "How many dollars are left?",
        ("a + b {things}", "x * c dollars", "y - d dollars"),
    ),
    _Story(
        "{name} buys {a} boxes with {b} {things} in each box. {friend} buys {c} boxes with {d} {things} in each box. "
        "How many {things} do they have together?",
        ("a * b {things}", "c * d {things}", "x + y {things}"),
    ),
    _Story(
        "{name} finds {a} {things} and {friend} finds {b} {things}. They give away {c} {things} and pack the others "
        "into {d} boxes. How many {things} are in each box?",
        ("a + b {things}", "x - c {things}", "y / d {things}"),
    ),
)
_NAMES = ("Ada", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon")
_THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "hats", "pens", "plums", "shells", "stamps", "toys")


def generate(count: int, seed: int, *, exclude: Collection[str] = (), slips: float = 0.0) -> list[Problem]:
    """Returns ``count`` problems with distinct questions; a pure function of its arguments.

    exclude: questions that must not occur. Pass the held-out questions here: two seeds alone do not give disjoint sets.
    slips:   share of answers with one result that is wrong by one or two, from which the following steps continue.
    """
    rng = random.Random(seed)
    excluded = frozenset(exclude)
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = _make_problem(rng.choice(_STORIES), rng, slips)
        if problem.question not in excluded:
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def write_jsonl(problems: Iterable[Problem], path: str | Path) -> None:
    """Writes one ``{"question": ..., "answer": ...}`` per line. Creates missing folders."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"question": problem.question, "answer": problem.answer}) for problem in problems)
    target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def final_answer(text: str) -> int | None:
    """Returns the number after the first ``####``, or None. Later text is ignored, because a model may continue."""
    found = re.search(r"####\s*(-?\d+)", text)
    return int(found[1]) if found else None


def _make_problem(story: _Story, rng: random.Random, slips: float) -> Problem:
    name, friend = rng.sample(_NAMES, 2)
    words = {"name": name, "friend": friend, "things": rng.choice(_THINGS)}
    letters = [letter for letter in "abcd" if f"{{{letter}}}" in story.text]
    slip = {rng.randrange(len(story.steps)): rng.choice((-2, -1, 1, 2))} if rng.random() < slips else {}
    while True:
        numbers = {letter: rng.randint(2, 99 if letter in story.large else 19) for letter in letters}
        chain = _solve(story.steps, numbers, slip)
        if chain is not None:
            break
    lines, final = chain
    return Problem(story.text.format(**words, **numbers), f"{' '.join(lines).format(**words)} #### {final}")


def _solve(steps: tuple[str, ...], numbers: dict[str, int], slip: dict[int, int]) -> tuple[list[str], int] | None:
    """Returns the worked lines and the last result, or None if a step is not easy for these numbers.

    slip: step index -> number added to its result.
    """
    known = dict(numbers)
    lines: list[str] = []
    result = 0
    for index, step in enumerate(steps):
        left, operator, right, unit = step.split()
        a, b = known[left], known[right]
        result = _compute(a, operator, b) + slip.get(index, 0)
        if not (2 <= result <= 99 and _easy(a, operator, b)):
            return None
        lines.append(f"{a} {operator} {b} = {result} {unit}.")
        known["xyz"[index]] = result
    return lines, result


def _compute(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]


def _easy(a: int, operator: str, b: int) -> bool:
    """Returns whether a product or exact quotient is in the times table up to 9 × 9; sums are always easy."""
    if operator == "/":
        return a % b == 0 and max(a // b, b) <= 9
    return operator != "*" or max(a, b) <= 9
