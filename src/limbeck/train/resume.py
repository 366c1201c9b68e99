"""What a run resumes from: a checkpoint and no mere model, and the settings that have changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.config.locations import leaves
from limbeck.errors import LimbeckError
from limbeck.train.checkpoint import MANIFEST, TRAINING

_NOT_COMPARED = "resume_from_checkpoint"


def refuse_model(path: Path) -> None:
    """Raise LimbeckError if the folder that ``resume_from_checkpoint`` names is a model without the state of a run."""
    if (path / "config.json").is_file() and not (path / TRAINING).exists():
        what = f"the folder {TRAINING}/" if (path / MANIFEST).exists() else f"{MANIFEST} and the folder {TRAINING}/"
        raise LimbeckError(
            f"resume_from_checkpoint = {str(path)!r} is a model and no checkpoint: it does not have {what}, from which a run "
            "resumes. To start a new run from its weights, set student_pretrain to this folder and remove "
            "resume_from_checkpoint."
        )


def changed_settings(path: Path, config: Mapping[str, Any]) -> list[str]:
    """The differences between the configuration of the checkpoint ``path`` and ``config``, as "key: was → now".

    config: in the form in which a checkpoint stores it, without secrets.

    A damaged checkpoint has none; loading it is an error.
    """
    try:
        stored = json.loads((path / TRAINING / "state.json").read_text())["config"]
    except (OSError, ValueError, KeyError):
        return []
    before, now = dict(leaves(stored)), dict(leaves(json.loads(json.dumps(config))))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and key != _NOT_COMPARED]
    return [f"{key}: {_shown(before.get(key))} → {_shown(now.get(key))}" for key in changed]


def _shown(value: Any) -> str:
    return "unset" if value is None or value == {} else json.dumps(value, ensure_ascii=False)
