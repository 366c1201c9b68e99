"""The result of a dialect: the values under Limbeck's keys, and where each of them came from."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

from limbeck.config.schema import Contradiction
from limbeck.config.validation_errors import format_value

SECTIONS: dict[str, tuple[str, ...]] = {
    "run": ("",),
    "checkpoint_config": ("checkpoint_config",),
    "worker": ("student", "teacher"),
    "model_args": ("student.model_args", "teacher.model_args"),
    "data_args": ("student.data_args", "teacher.data_args", "validation.data_args"),
    "training_args": ("student.training_args", "teacher.training_args"),
    "strategy_args": ("student.strategy_args", "teacher.strategy_args"),
    "strategy_config": ("student.strategy_args.strategy_config", "teacher.strategy_args.strategy_config"),
}
"""The paths of each kind of section. Tables of a dialect are grouped by kind."""


@dataclass
class Translation:
    """A configuration under Limbeck's keys. All keys are dotted paths.

    Attributes:
        values: nested dictionaries that the schema checks next.
        derived: Limbeck's key to the key or flag of the source that it was computed from.
        ignored: keys of the source that have no effect in Limbeck.
        notices: sentences about settings that behave differently in Limbeck.
        contradictions: keys of the source that Limbeck does not support.
    """

    values: dict[str, Any]
    derived: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    contradictions: list[Contradiction] = field(default_factory=list)

    def refuse(self, path: str, sentence: str) -> None:
        """Record an error about ``path``; ``sentence`` continues after the key's name."""
        self.contradictions.append(Contradiction(path, sentence))

    def put(self, path: str, value: object, derived_from: str) -> None:
        """Set Limbeck's key ``path`` to a value computed from the key or flag ``derived_from`` of the source."""
        section = self.values
        *parents, key = path.split(".")
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[key] = value
        self.derived[path] = derived_from

    def set(self, path: str, value: object, derived_from: str) -> None:
        """As ``put``, but it is an error if ``path`` already has another value."""
        present = self.get(path)
        if present is not None and present != value and str(present) != str(value):  # flags have values of text
            self.refuse(
                derived_from,
                f"= {format_value(value)} contradicts {self.derived.get(path, path)} = {format_value(present)}; "
                "keep one of them",
            )
        else:
            self.put(path, value, derived_from)

    def default(self, path: str, value: object, derived_from: str) -> None:
        """As ``put``, unless ``path`` has a value."""
        if self.get(path) is None:
            self.put(path, value, derived_from)

    def get(self, path: str) -> Any:
        """The value at ``path``, or None."""
        parent, _, key = path.rpartition(".")
        section = self.section(parent)
        return None if section is None else section.get(key)

    def pop(self, path: str) -> Any:
        """Remove the value at ``path`` and return it, or None."""
        parent, _, key = path.rpartition(".")
        section = self.section(parent)
        return None if section is None else section.pop(key, None)

    def section(self, path: str) -> dict[str, Any] | None:
        """The section at ``path`` ("" is the top level), or None."""
        section: Any = self.values
        for part in path.split(".") if path else ():
            section = section.get(part) if isinstance(section, dict) else None
        return section if isinstance(section, dict) else None

    def sections(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The prefix (path and dot) and the content of every section of a kind (a key of ``SECTIONS``) that exists."""
        for path in SECTIONS[kind]:
            section = self.section(path)
            if section is not None:
                yield f"{path}." if path else "", section

    def ignore(self, path: str, keys: Set[str]) -> None:
        """Remove ``keys`` from the section at ``path`` and record them as ignored."""
        section = self.section(path) or {}
        for key in [key for key in section if key in keys]:
            del section[key]
            self.ignored.append(f"{path}.{key}" if path else key)

    def move(self, source: str, target: str) -> None:
        """Move the value at ``source`` to Limbeck's key ``target``; both set to different values is an error."""
        value = self.pop(source)
        if value is None:
            return
        present = self.get(target)
        if present is None:
            self.put(target, value, source)
        elif present != value:
            self.refuse(
                source, f"= {format_value(value)} contradicts {target} = {format_value(present)}; keep the latter only"
            )
