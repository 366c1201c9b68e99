"""Checks names of checkpoints: local folders, or names on the hub."""

from __future__ import annotations

from pathlib import Path

from limbeck.errors import LimbeckError


def check_folder(name: str | None, role: str, holds: str | None = None) -> None:
    """Raises LimbeckError if ``name`` can only be a folder that does not exist, or is a folder without the file ``holds``.

    ``name`` and ``owner/name`` may be hub names, which are not checked here.
    """
    if name is None:
        return
    if Path(name).is_dir():
        if holds is not None and not (Path(name) / holds).is_file():
            raise LimbeckError(
                f"there is no {holds} in {name!r}, so the {role} cannot be loaded from it; check the path."
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LimbeckError(f"there is no folder {name!r} to load the {role} from; check the path.")
