"""Random changes of nested values, for tests that whatever is given is accepted or refused with a sentence.

``LIMBECK_FUZZ=1000`` in the environment sets the number of cases of each such test.
"""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Callable, Sequence
from typing import Any

from limbeck.errors import LimbeckError

SECONDS = 60
VALUES = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.5, 1e-300, 1e308, float("inf"), float("nan"),
    "", " ", "0", "1e3", "true", "null", "auto", "none", "all", "\0", "\n", "a\ud800", "é" * 300, "${oc.env:NOT_THERE}",
    "${nowhere}", "${max_steps}", "hub:", "a,b", "1,2", "[1, 2", "{}", "/", ".", "..", "~", "%s", "*.jsonl", "(", "x.yaml",
    [], [None], [[]], [0, 0], ["a"], [{}], [[1, 2, 3]], {}, {"a": 1}, {"": None}, {1: 2}, {"a": {"b": {"c": []}}},
]  # fmt: skip


def count(default: int) -> int:
    """The number of cases."""
    return int(os.environ.get("LIMBECK_FUZZ", default))


def mutate(values: dict[str, Any], chance: random.Random, names: Sequence[str]) -> None:
    """One change of ``values``: a place is dropped, copied, exchanged or renamed, or gets another value.

    names: dotted paths at which a value may be added.
    """
    places = _places(values)
    if not places:
        return
    inside, key = chance.choice(places)
    other, at = chance.choice(places)
    kind = chance.choice(["drop", "duplicate", "retype", "rename", "add", "copy"])
    if kind == "drop":
        del inside[key]
    elif kind == "duplicate" and isinstance(other, list):
        other.append(copy.deepcopy(inside[key]))
    elif kind == "duplicate":
        other[str(key)] = copy.deepcopy(inside[key])
    elif kind == "retype":
        inside[key] = copy.deepcopy(chance.choice(VALUES))
    elif kind == "rename" and isinstance(inside, dict):
        text = str(key)
        cut = chance.randrange(len(text) + 1)
        inside[text[:cut] + chance.choice(["", "x", ".", "_", " "]) + text[cut + 1 :]] = inside.pop(key)
    elif kind == "add":
        *sections, leaf = chance.choice(names).split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {}) if isinstance(section.get(name, {}), dict) else {}
        section[leaf] = copy.deepcopy(chance.choice(VALUES))
    elif kind == "copy":
        inside[key] = copy.deepcopy(other[at])


def refusal(work: Callable[[], object], shown: str) -> str | None:
    """Call ``work`` and return the message of its LimbeckError; None if there was none.

    Any other exception, and a call that does not end, is an AssertionError that contains ``shown``.
    """

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"no result within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        work()
    except LimbeckError as error:
        assert str(error).strip()
        return str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{shown}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Every container and key of nested dictionaries and lists."""
    keys = list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    return [(values, key) for key in keys] + [place for key in keys for place in _places(values[key])]
