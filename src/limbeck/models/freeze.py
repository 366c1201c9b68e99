"""Freezes parameters by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from limbeck.errors import LimbeckError

_SECTION = "student.model_args"


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Sets ``requires_grad`` to False for every parameter whose name starts with one of ``prefixes``.

    Raises LimbeckError if a prefix matches no parameter, or no parameter is left to train.
    """
    for parameter in _matching(model, "freeze_module_prefix", prefixes, lambda prefix, name: name.startswith(prefix)):
        parameter.requires_grad_(False)
    _check_some_trained(model, "freeze_module_prefix")


def select_trained(
    model: nn.Module, unfrozen: Sequence[str] | None, frozen: Sequence[str] | None, match: str = "substring"
) -> None:
    """Sets ``requires_grad`` by name: only what ``unfrozen`` matches is trained, and nothing that ``frozen`` matches.

    A tied parameter has several names; it is matched if one of them is.

    Args:
        unfrozen: None for all parameters.
        frozen: None for no parameter.
        match: ``substring``, or ``regex``, which is searched for in the name.

    Raises LimbeckError if an entry matches no parameter, or no parameter is left to train.
    """

    def matches(entry: str, name: str) -> bool:
        return entry in name if match == "substring" else re.search(entry, name) is not None

    trained = None if unfrozen is None else set(_matching(model, "unfrozen_parameters", unfrozen, matches, match))
    held = set(_matching(model, "frozen_parameters", frozen or (), matches, match))
    for parameter in model.parameters():
        if parameter in held or (trained is not None and parameter not in trained):
            parameter.requires_grad_(False)
    _check_some_trained(model, "frozen_parameters" if frozen else "unfrozen_parameters")


def _matching(
    model: nn.Module,
    key: str,
    entries: Sequence[str],
    matches: Callable[[str, str], bool],
    match: str = "regex",
) -> Iterator[nn.Parameter]:
    """The parameters that an entry matches. Raises LimbeckError for an entry that matches none."""
    names = dict(model.named_parameters(remove_duplicate=False))
    for entry in entries:
        found = [name for name in names if matches(entry, name)]
        if not found:
            hint = (
                "; it looks like a regular expression, so set parameter_match: regex" if _is_regex(entry, match) else ""
            )
            raise LimbeckError(
                f"{_SECTION}.{key}: no parameter {'begins with' if key == 'freeze_module_prefix' else 'matches'} {entry!r}"
                f"{hint}; names look like {', '.join(list(names)[:3])}."
            )
        yield from (names[name] for name in found)


def _is_regex(entry: str, match: str) -> bool:
    return match == "substring" and any(mark in entry for mark in "^$*+?[]()|\\")


def _check_some_trained(model: nn.Module, key: str) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise LimbeckError(f"{_SECTION}.{key} freezes every parameter; leave some to train.")
