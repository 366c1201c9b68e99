"""Checkpoints that are whole or absent.

``checkpoint-<step>/`` is a Hugging Face folder (the student in safetensors, its tokenizer) that loads anywhere, plus
``training/`` with what only a resumed run needs, plus ``manifest.json`` with every file's size and SHA-256. It is
written under a temporary name and renamed when complete. Nothing in it is pickled.

This file knows folders and tensors by name; it does not know models, optimizers or data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.errors import LimbeckError

MANIFEST = "manifest.json"
TRAINING = "training"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a resumed run needs.

    step: optimizer steps taken. masters: trainable parameters as the optimizer sees them. optimizer: its tensors.
    state: JSON values (data position, scheduler, …). metric: the validation metric, if a validation ran.
    """

    step: int
    masters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    metric: float | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, write_student: Callable[[Path], None]) -> Path:
    """Write ``folder/checkpoint-<step>`` and return it; ``write_student(path)`` puts the usable student there."""
    final = folder / f"checkpoint-{checkpoint.step}"
    temporary = folder / f".{final.name}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / TRAINING).mkdir(parents=True)
    write_student(temporary)
    save_file(_contiguous(checkpoint.masters), temporary / TRAINING / "masters.safetensors")
    save_file(_contiguous(checkpoint.optimizer), temporary / TRAINING / "optimizer.safetensors")
    (temporary / TRAINING / "state.json").write_text(json.dumps(dict(checkpoint.state), indent=1))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest: dict[str, Any] = {
        "step": checkpoint.step,
        "metric": checkpoint.metric,
        "files": {str(path.relative_to(temporary)): _fingerprint(path) for path in files},
    }
    manifest["sha256"] = _own_digest(manifest)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, temporary / MANIFEST]:
        path.chmod(0o644)  # safetensors leaves its files to their owner alone; a shared disk has other readers
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint back after checking every file; a damaged one is refused with the newest whole one's name."""
    damage = find_damage(path)
    if damage is not None:
        whole = [other for other in list_checkpoints(path.parent) if other != path and find_damage(other) is None]
        advice = (
            f"go on from the newest whole one with resume_from_checkpoint: {whole[-1]}"
            if whole
            else "no other one there is whole, so start anew"
        )
        raise LimbeckError(f"{path} is damaged ({damage}); {advice}.")
    manifest = json.loads((path / MANIFEST).read_text())
    training = path / TRAINING
    return Checkpoint(
        manifest["step"],
        load_file(training / "masters.safetensors"),
        load_file(training / "optimizer.safetensors"),
        json.loads((training / "state.json").read_text()),
        manifest["metric"],
    )


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint in a few words, or None when it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["sha256"] != _own_digest(manifest):
            return f"{MANIFEST} has been changed"
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
            if _fingerprint(file) != expected:
                return f"{name} has been changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def refuse_earlier_checkpoints(resume: bool | str, folder: Path) -> None:
    """Raise LimbeckError if a run that does not resume would mix its checkpoints with another's."""
    if not resume and list_checkpoints(folder):
        raise LimbeckError(
            f"{folder} holds the checkpoints of an earlier run; set resume_from_checkpoint: true to go on with it, or another "
            "output_dir."
        )


def find_resume(setting: bool | str, folder: Path) -> Path | None:
    """What ``resume_from_checkpoint`` points at: None for false, or for true/latest when there is none yet."""
    if setting in (False, "false", ""):
        return None
    if setting in (True, "true", "latest"):
        existing = list_checkpoints(folder)
        return existing[-1] if existing else None
    path = Path(str(setting))
    if not path.is_dir():
        nearby = list_checkpoints(path.parent) or list_checkpoints(folder)
        names = ", ".join(map(str, nearby)) or "none"
        raise LimbeckError(
            f"resume_from_checkpoint = {str(path)!r} is not a folder; the checkpoints there are: {names}."
        )
    if not _NAME.fullmatch(path.resolve().name) and list_checkpoints(path):
        return list_checkpoints(path)[-1]
    return path


def refuse_later_checkpoints(resume: Path, folder: Path) -> None:
    """Raise LimbeckError if ``folder`` has whole checkpoints later than ``resume``: a run from there would be mixed
    with them.
    """
    existing = [path.resolve() for path in list_checkpoints(folder)]
    place = existing.index(resume.resolve()) + 1 if resume.resolve() in existing else 0
    later = [path for path in existing[place:] if find_damage(path) is None]
    if later:
        raise LimbeckError(
            f"{folder} also holds {', '.join(path.name for path in later)}, which a run from {resume} would be mixed with; "
            "set another output_dir, or move them away."
        )


def prune(folder: Path, keep: int, best_mode: str) -> None:
    """Remove the oldest checkpoints beyond ``keep`` (0 = all stay); the best and the newest are never removed."""
    existing = list_checkpoints(folder)
    if keep <= 0 or len(existing) <= keep:
        return
    best = best_checkpoint(folder, best_mode)
    removable = [path for path in existing[:-1] if path != best]
    for path in removable[: len(existing) - keep]:
        shutil.rmtree(path)


def best_checkpoint(folder: Path, mode: str) -> Path | None:
    """The checkpoint with the lowest (``min``) or highest (``max``) recorded metric; the earliest of equals."""
    ranked = []
    for path in list_checkpoints(folder):
        try:
            metric = json.loads((path / MANIFEST).read_text())["metric"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one is nobody's best; resuming from it is what tells its damage
        if metric is not None:
            ranked.append((metric if mode == "min" else -metric, int(path.name.split("-")[1]), path))
    return min(ranked)[2] if ranked else None


def point(link: Path, target: Path) -> None:
    """Make the symbolic link ``link`` name ``target`` beside it, without a moment in which it names nothing."""
    temporary = link.with_name(f".{link.name}.writing")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name, target_is_directory=True)
    temporary.replace(link)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _own_digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses two names for one memory, as tied or sliced tensors have.
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
