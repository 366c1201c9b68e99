"""A file of NeMo-RL while it is translated: access to its keys, and the check of all of them against the tables."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from limbeck.config.dialects.nemo_rl_spellings import choose_spelling, is_override
from limbeck.config.dialects.nemo_rl_table import (
    DISABLED_BY,
    FIXED,
    FLAGS,
    MOVED,
    NESTED,
    NO_MEANING,
    READ,
    TEACHER_READS,
    Fixed,
)
from limbeck.config.locations import SourceLocation
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value
from limbeck.registry import ENVIRONMENTS


class NemoRlFile:
    """One file and its translation. Paths have ``policy`` for the student's section, also if the file calls it ``student``."""

    def __init__(self, source: Mapping[str, Any], locations: Mapping[str, SourceLocation]) -> None:
        self.locations = locations
        self.source: dict[str, Any] = copy.deepcopy(dict(source))  # values of the wrong kind are taken out of it
        self.student = "student" if "student" in source and "policy" not in source else "policy"
        self.result = Translation({})
        self.wrong: set[str] = set()  # numbers that are missing, or not what ``whole`` expects

    def get(self, path: str) -> Any:
        """The value at ``path``, or None."""
        value: Any = self.source
        for part in self.written(path).split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def section(self, path: str) -> Mapping[str, Any]:
        """The section at ``path``; empty if there is none."""
        value = self.get(path)
        return value if isinstance(value, Mapping) else {}

    def written(self, path: str) -> str:
        """``path`` as the file writes it."""
        head, dot, rest = path.partition(".")
        return f"{self.student if head == 'policy' else head}{dot}{rest}"

    def is_override(self, path: str) -> bool:
        """Whether the command line sets the key at ``path``."""
        return is_override(self.written(path), self.locations)

    def one_of(self, *paths: str) -> tuple[Any, str]:
        """The value that counts among spellings of one setting, and its path; see ``choose_spelling``."""
        return choose_spelling(self.result, [(self.get(path), self.written(path)) for path in paths], self.locations)

    def refuse(self, path: str, sentence: str) -> None:
        self.result.refuse(self.written(path), sentence)

    def put(self, target: str, value: Any, path: str) -> None:
        if value is not None:
            self.result.put(target, value, self.written(path))

    def whole(self, path: str, default: int = 1) -> int:
        """A number of at least 1, for arithmetic; ``default`` if it is unset or wrong."""
        value = None if path in self.wrong else self.get(path)
        if value is None:
            return default
        if type(value) is not int or value < 1:
            self.wrong.add(path)
            self.refuse(path, f"= {format_value(value)} must be a whole number of at least 1")
            if path in MOVED:
                self.result.pop(MOVED[path])  # one error is enough
            return default
        return value

    @property
    def generation_devices(self) -> int:
        """Number of devices that only the generation has; 0 if it shares those of the training."""
        path = "policy.generation.colocated"
        if self.section(path).get("enabled") is not False:
            return 0
        count = self.get(f"{path}.resources.gpus_per_node")
        return count if type(count) is int and 0 < count < self.whole("cluster.gpus_per_node") else 0

    @property
    def num_ranks(self) -> int:
        """Number of devices of the training, which student and teacher share."""
        return self.whole("cluster.gpus_per_node") * self.whole("cluster.num_nodes") - self.generation_devices

    def is_enabled(self, path: str) -> bool:
        return self.section(path).get("enabled") is True

    def check(self) -> None:
        """Report unknown keys and values that are not supported, collect the keys without effect, and move the others."""
        if "student" in self.source and "policy" in self.source:
            self.result.refuse("student", "and policy are both sections of the student; keep one")
        self._check("", self.source)
        for path, target in MOVED.items():
            self.put(target, self.get(path), path)

    def _check(self, path: str, section: dict[str, Any]) -> None:
        table = path
        if path.startswith("data."):
            table = "dataset"
        elif path.partition(".")[0] in ("student", "teacher"):
            table = ".".join(["policy", *path.split(".")[1:]])
        fixed, ignored = FIXED.get(table, {}), NO_MEANING.get(table, frozenset())
        known = {*READ.get(table, ()), *fixed, *ignored, *_moved_keys(table)}
        for key, value in list(section.items()):
            inner, kind = f"{path}.{key}" if path else key, f"{table}.{key}" if table else key
            if key in fixed:
                self._check_fixed(inner, value, fixed[key])
            elif path == "teacher" and key in known and key not in TEACHER_READS:
                self.result.ignored += self._unread_of_teacher(inner, value)
            elif key in ignored:
                self.result.ignored.append(inner)
            elif path == "env" and key not in known and key in ENVIRONMENTS:
                continue  # arguments of an environment, which it checks itself
            elif kind in DISABLED_BY:
                self._check_switched(inner, value, kind)
            elif key in known and isinstance(value, (Mapping, list)) and _is_single(kind):
                self.result.refuse(inner, f"= {format_value(value)} must be one value, not a list or a section of keys")
                section[key] = None  # what reads it expects a value
            elif key in known and key in FLAGS and value is not None and not isinstance(value, bool):
                self.result.refuse(inner, f"= {format_value(value)} is not true or false")
                del section[key]
            elif key in known:
                self._check_inner(inner, value, kind)
            elif path:
                self.result.refuse(inner, f"is not a key of NeMo-RL's distillation{_nearest(key, known)}")
            elif near := _nearest(key, known):
                self.result.refuse(inner, f"is not a section of NeMo-RL's distillation{near}")
            else:  # a variable, if a ${...} refers to it; the schema refuses it otherwise
                self.result.values[key] = value

    def _check_inner(self, path: str, value: Any, kind: str) -> None:
        sections = {"student", "teacher", "data.train", "data.validation", "data.default", *READ}
        if kind not in sections or value is None or (kind == "policy.tokenizer" and isinstance(value, str)):
            return
        for one in value if isinstance(value, list) and kind.startswith("data.") else [value]:
            if isinstance(one, dict):
                self._check(path, one)
            else:
                self.result.refuse(path, f"= {format_value(one)} must be a section of keys")

    def _unread_of_teacher(self, path: str, value: Any) -> Iterator[str]:
        """The keys at ``path``, which NeMo-RL does not read either, with another value than the student's.

        A teacher is usually written as a copy of the student's section, whose keys need no notice.
        """
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from self._unread_of_teacher(f"{path}.{key}", inner)
        elif value not in (None, self.get(path.replace("teacher", "policy", 1))) and not (
            path in ("teacher.tokenizer", "teacher.tokenizer.name") and value == self.get("teacher.model_name")
        ):
            yield path

    def _check_switched(self, path: str, value: Any, kind: str) -> None:
        unsupported = DISABLED_BY[kind]
        enabled = isinstance(value, dict) and value.get("enabled") is True
        if isinstance(value, dict) and not isinstance(value.get("enabled"), (bool, type(None))):
            self.result.refuse(f"{path}.enabled", f"= {format_value(value['enabled'])} is not true or false")
        elif enabled and unsupported is not None:
            self.result.refuse(f"{path}.enabled", f"= true {unsupported.sentence}")
        elif enabled:
            self._check(path, value)
        elif value is not None and not isinstance(value, dict):
            self.result.refuse(path, f"= {format_value(value)} must be a section of keys, with enabled: true or false")

    def _check_fixed(self, path: str, value: Any, fixed: Fixed) -> None:
        off = fixed.section and isinstance(value, Mapping) and not value.get("enabled")
        if not off and not any(type(value) is type(one) and value == one for one in fixed.values):
            shown = "" if isinstance(value, (Mapping, list)) else f"= {format_value(value)} "
            self.result.refuse(path, f"{shown}{fixed.sentence}")


def _is_single(kind: str) -> bool:
    """Whether a key is read here and has neither a section nor a list. The schema checks the values of moved keys."""
    return kind not in {*MOVED, *READ, *NESTED}


def _moved_keys(table: str) -> Iterator[str]:
    """The keys of a section that are moved, and those of sections in it."""
    prefix = f"{table}." if table else ""
    for path in (*MOVED, *(kind for kind in READ if kind)):
        if path.startswith(prefix):
            yield path.removeprefix(prefix).partition(".")[0]


def _nearest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
