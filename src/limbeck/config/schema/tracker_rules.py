"""Contradictions between ``track_with`` and ``tracker_kwargs``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from limbeck.config.schema.base import Contradiction
from limbeck.config.schema.training import TRACKER_KWARGS

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields

_SECRETS = ("api_key", "login_kwargs")
"""Arguments of ROLL's trackers that hold a key."""


def tracker_contradictions(config: RunFields) -> Iterator[Contradiction]:
    """Arguments that no tracker reads."""
    if isinstance(config.track_with, str):
        yield from _unread(config.track_with, config.tracker_kwargs, "tracker_kwargs")
        return
    for name, given in config.tracker_kwargs.items():
        path = f"tracker_kwargs.{name}"
        if name not in config.track_with:
            listed = ", ".join(config.track_with) or "none"
            yield Contradiction(
                path, f"is not one of the trackers ({listed}); a list of trackers needs a section for each"
            )
        elif isinstance(given, Mapping):
            yield from _unread(name, given, path)
        elif given is not None:
            yield Contradiction(path, f"must be a section with the arguments of {name}")


def _unread(tracker: str, given: Mapping[str, Any], path: str) -> Iterator[Contradiction]:
    if tracker not in TRACKER_KWARGS:  # one from a plug-in checks its own arguments
        return
    readable = TRACKER_KWARGS[tracker]
    for key in given:
        if key in _SECRETS and readable:
            yield Contradiction(
                f"{path}.{key}", f"is a secret, which is not read from a file; set {tracker.upper()}_API_KEY instead"
            )
        elif key not in readable:
            listed = ", ".join(readable) or "none"
            yield Contradiction(f"{path}.{key}", f"is not read by track_with = {tracker}, which reads {listed}")
