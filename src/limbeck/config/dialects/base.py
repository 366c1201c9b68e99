"""The protocol of a dialect, and the choice of one for a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from limbeck.config.locations import SourceLocation
from limbeck.config.translation import Translation
from limbeck.errors import LimbeckError
from limbeck.registry import DIALECTS

Source = Mapping[str, Any] | Sequence[str]
"""A configuration as its user wrote it: nested dictionaries of a file, or a vector of command-line arguments."""

NATIVE = "limbeck"
"""The dialect of every file that no other dialect recognises."""


class Dialect(Protocol):
    """A configuration format that Limbeck can read.

    Attributes:
        name: the name under which it is registered.
        system: how users call the system, such as ``"ROLL"``; error messages and notices use it.
    """

    name: str
    system: str

    def recognises(self, source: Source) -> bool:
        """Whether ``source`` is written in this dialect. Must be false for what another system could have written."""
        ...

    def translate(self, source: Source, locations: dict[str, SourceLocation]) -> Translation:
        """Express ``source`` in Limbeck's keys.

        Args:
            source: never modified.
            locations: location of each key (dotted path) or flag of ``source``. A dialect that reads further files adds
                the locations of their keys.
        """
        ...


def choose_dialect(source: Source, source_name: str, name: str | None = None) -> Dialect:
    """The dialect called ``name``, else the one that recognises ``source``, else the native one (for a mapping).

    Raises:
        LimbeckError: if ``name`` is unknown, if several dialects recognise ``source``, or if none recognises an argument
            vector.
    """
    if name is not None:
        if name not in DIALECTS:
            raise LimbeckError(f"dialect {name} is not known; use one of {', '.join(DIALECTS.names())}.")
        return DIALECTS.get(name)
    foreign = [DIALECTS.get(other) for other in DIALECTS.names() if other != NATIVE]
    candidates = [dialect for dialect in foreign if dialect.recognises(source)]
    if len(candidates) > 1:
        names = " and ".join(dialect.name for dialect in candidates)
        raise LimbeckError(f"{source_name}: the dialects {names} both recognise this; choose one with --dialect NAME.")
    if candidates:
        return candidates[0]
    if not isinstance(source, Mapping):
        raise LimbeckError(
            f"{source_name}: no dialect recognises these arguments; choose one with --dialect NAME "
            f"({', '.join(DIALECTS.names())}), or write a YAML file."
        )
    return DIALECTS.get(NATIVE)
