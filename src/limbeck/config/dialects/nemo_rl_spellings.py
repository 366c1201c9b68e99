"""Settings that NeMo-RL and its fork spell differently: which of several spellings counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from limbeck.config.locations import COMMAND_LINE, SourceLocation, find_location
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value

Setting = tuple[Any, str]
"""A value and the path under which it is written."""


def choose_spelling(
    result: Translation,
    given: Sequence[Setting],
    locations: Mapping[str, SourceLocation],
    meaning: Callable[[Any], Any] = lambda value: value,
) -> Setting:
    """The one of several spellings of a setting that counts: the first with a value, or the first one if none has a value.

    A value of the command line replaces a different one of a file, which the notice of ignored settings lists. Any other
    difference is an error.

    Args:
        meaning: what is compared in place of the values, such as the file that a value names.
    """
    chosen, *others = [one for one in given if one[0] is not None] or [given[0]]
    for other in others:
        if meaning(other[0]) == meaning(chosen[0]):
            continue
        if is_override(chosen[1], locations) == is_override(other[1], locations):
            place = find_location(chosen[1], locations)
            written = f"{chosen[1]} = {format_value(chosen[0])}{f' ({place.short})' if place else ''}"
            result.refuse(
                other[1], f"= {format_value(other[0])} contradicts {written}, which sets the same; set one of them only"
            )
            continue
        chosen, lost = (chosen, other) if is_override(chosen[1], locations) else (other, chosen)
        ignore_once(result, lost[1])
    return chosen


def is_override(path: str, locations: Mapping[str, SourceLocation]) -> bool:
    """Whether the command line sets ``path``."""
    return find_location(path, locations) == COMMAND_LINE


def ignore_once(result: Translation, path: str) -> None:
    """Add ``path`` to the settings without effect."""
    if path not in result.ignored:
        result.ignored.append(path)
