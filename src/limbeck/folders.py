"""Checks the names of checkpoints: local folders, or ids on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from limbeck.errors import LimbeckError


def check_folder(name: str | None, role: str, holds: str | None = None) -> None:
    """Check that a local folder exists. ``name`` and ``owner/name`` may be hub ids, which are not checked.

    Args:
        name: folder or hub id; None is not checked.
        role: what is loaded from it, for error messages.
        holds: name of a file that the folder must contain.

    Raises:
        LimbeckError: if ``name`` can only be a folder and does not exist, or if the folder has no file ``holds``.
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
