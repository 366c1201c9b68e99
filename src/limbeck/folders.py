"""Names of checkpoints: a folder here, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from limbeck.errors import LimbeckError


def check_folder(name: str | None, role: str, holds: str | None = None) -> None:
    """Raise LimbeckError if ``name`` can only be a folder and there is none, or the folder does not have the file ``holds``.

    A hub name is ``name`` or ``owner/name``; whether it is there, the hub knows.
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
