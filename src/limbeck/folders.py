"""Finds checkpoints in folders, and checks their names: local folders, or ids on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from limbeck.errors import LimbeckError

MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"
"""The file in which Megatron-LM keeps the iteration of its newest checkpoint."""


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run in ``folder``, oldest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def run_weights(folder: Path) -> Path | None:
    """The newest weights in the output folder of a run: its newest checkpoint or, where only that is left, ``student``.

    ``student`` may be a copy that is older than the checkpoints beside it. None if ``folder`` has neither.
    """
    found = [*reversed(list_checkpoints(folder)), folder / "student"]
    return next((path for path in found if (path / "config.json").is_file()), None)


def is_megatron_checkpoint(name: str | None) -> bool:
    """Whether a local folder holds checkpoints of Megatron-LM, or is one of them."""
    folder = Path(name or "")
    if name is None or "\0" in name or not folder.is_dir() or (folder / "config.json").is_file():
        return False
    return any(next(folder.glob(pattern), None) for pattern in (MEGATRON_TRACKER, "iter_*", ".metadata", "mp_rank_*"))


def check_folder(name: str | None, role: str, holds: str | None = None) -> None:
    """Check that a local folder exists. ``name`` and ``owner/name`` may be hub ids, which are not checked.

    Args:
        name: folder or hub id; None is not checked.
        role: what is loaded from it, for error messages.
        holds: name of a file that the folder must contain, unless it has checkpoints of Megatron-LM.

    Raises:
        LimbeckError: if ``name`` can only be a folder and does not exist, or if the folder has no file ``holds``.
    """
    if name is None:
        return
    if Path(name).is_dir():
        if holds is not None and not (Path(name) / holds).is_file() and not is_megatron_checkpoint(name):
            raise LimbeckError(
                f"there is no {holds} in {name!r}, so the {role} cannot be loaded from it; check the path."
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LimbeckError(f"there is no folder {name!r} to load the {role} from; check the path.")
