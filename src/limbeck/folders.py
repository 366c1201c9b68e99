"""Finds checkpoints in folders, and checks their names: local folders, or ids on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError

TRAINING = "training"
"""The folder in a checkpoint with the state of its run."""

MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"
"""The file in which Megatron-LM keeps the iteration of its newest checkpoint."""

MEGATRON_INDEX = ".metadata"
"""The index of a Megatron-LM checkpoint in the format ``torch_dist``."""

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


def stored_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run that wrote ``checkpoint``, without secrets; empty if the checkpoint is damaged, which is an
    error when it is loaded.
    """
    try:
        found = json.loads((checkpoint / TRAINING / "state.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def is_megatron_checkpoint(name: str | None) -> bool:
    """Whether a local folder holds checkpoints of Megatron-LM, or is one of them."""
    folder = Path(name or "")
    if name is None or "\0" in name or not folder.is_dir() or (folder / "config.json").is_file():
        return False
    return any(
        next(folder.glob(pattern), None)
        for pattern in (MEGATRON_TRACKER, "iter_*", "release", MEGATRON_INDEX, "mp_rank_*")
    )


def megatron_iterations(folder: Path) -> dict[int, Path]:
    """The checkpoints of Megatron-LM in ``folder`` by iteration, oldest first."""
    numbers = {int(path.name[5:]): path for path in folder.glob("iter_*") if path.name[5:].isdecimal()}
    return dict(sorted(numbers.items()))


def megatron_iteration(folder: Path) -> Path:
    """The Megatron-LM checkpoint in ``folder``: itself, or the one in it that is the newest by its tracker.

    Raises:
        LimbeckError: if there is none.
    """
    if (folder / MEGATRON_INDEX).is_file() or next(folder.glob("mp_rank_*"), None) is not None:
        return folder
    tracker = folder / MEGATRON_TRACKER
    if not tracker.is_file():
        raise LimbeckError(
            f"{folder} has no {MEGATRON_TRACKER} that names its newest checkpoint; use the path of one of its folders iter_*."
        )
    newest = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if newest != "release" and not newest.isdecimal():
        raise LimbeckError(f"{tracker} names {newest[:30]!r}, which is neither an iteration nor release; correct it.")
    found = folder / (newest if newest == "release" else f"iter_{int(newest):07d}")
    if not found.is_dir():
        raise LimbeckError(f"{tracker} names {found.name}, but there is no such folder; copy the checkpoint again.")
    return found


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
