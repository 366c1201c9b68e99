"""Reads and writes checkpoints, atomically and with checksums.

``checkpoint-<step>/`` is a Hugging Face folder (the student in safetensors, and its tokenizer). In addition it has
``training/`` with the state for resuming, and ``manifest.json`` with the size and SHA-256 of every file. A checkpoint is
written under a temporary name and renamed when it is complete. No file contains a pickle.

This module handles files and named tensors only; it does not know models, optimizers or data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
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
    """The state from which a run resumes.

    Attributes:
        step: number of optimizer steps taken.
        masters: trained parameters in float32, by name.
        optimizer: tensors of the optimizer state, by name.
        state: JSON values, such as the position in the data.
        metric: the value that selects the best checkpoints; None if it was not measured. metric_name: which metric that is.
    """

    step: int
    masters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    metric: float | None = None
    metric_name: str | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, write_student: Callable[[Path], None]) -> Path:
    """Write a checkpoint.

    Args:
        folder: the parent folder.
        checkpoint: what to write.
        write_student: writes the Hugging Face files of the student to the path that it is given.

    Returns:
        ``folder/checkpoint-<step>``.
    """
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
        "metric_name": checkpoint.metric_name,
        "files": {str(path.relative_to(temporary)): _fingerprint(path) for path in files},
    }
    manifest["sha256"] = _own_digest(manifest)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, temporary / MANIFEST]:
        path.chmod(0o644)  # safetensors creates files that only their owner can read
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after comparing every file with the manifest.

    Raises:
        LimbeckError: if it is damaged; the message names the newest intact checkpoint beside it.
    """
    damage = find_damage(path)
    if damage is not None:
        intact = [other for other in list_checkpoints(path.parent) if other != path and find_damage(other) is None]
        advice = (
            f"resume from the newest intact checkpoint with resume_from_checkpoint: {intact[-1]}"
            if intact
            else "there is no intact checkpoint beside it, so start a new run in another output_dir"
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
    """The first difference between a checkpoint and its manifest, in words; None if it is intact."""
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
    """Raise LimbeckError if a run does not resume and ``folder`` contains checkpoints of another run."""
    if not resume and list_checkpoints(folder):
        raise LimbeckError(
            f"{folder} contains checkpoints of an earlier run; set resume_from_checkpoint: true to resume it, or set another "
            "output_dir."
        )


def find_resume(setting: bool | str, folder: Path) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` selects.

    Args:
        setting: the value of the key: false, true, ``latest``, or a path.
        folder: where the checkpoints of the run are.

    Returns:
        None if the setting is false, or if there is no checkpoint yet for true and ``latest``.

    Raises:
        LimbeckError: if it is a path that does not exist.
    """
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
            f"resume_from_checkpoint = {str(path)!r} is not a folder; use one of the existing checkpoints: {names}."
        )
    if not _NAME.fullmatch(path.resolve().name) and list_checkpoints(path):
        return list_checkpoints(path)[-1]
    return path


def refuse_later_checkpoints(resume: Path, folder: Path) -> None:
    """Raise LimbeckError if ``folder`` contains intact checkpoints later than ``resume``, which belong to another run."""
    existing = [path.resolve() for path in list_checkpoints(folder)]
    place = existing.index(resume.resolve()) + 1 if resume.resolve() in existing else 0
    later = [path for path in existing[place:] if find_damage(path) is None]
    if later:
        raise LimbeckError(
            f"{folder} also contains {', '.join(path.name for path in later)}, later than {resume}; set another output_dir, "
            "or move the later checkpoints to another folder."
        )


def prune(folder: Path, keep: int, best: Collection[Path]) -> None:
    """Remove the oldest checkpoints so that ``keep`` remain; 0 keeps all. Those in ``best`` and the newest are never
    removed.
    """
    existing = list_checkpoints(folder)
    if keep <= 0 or len(existing) <= keep:
        return
    removable = [path for path in existing[:-1] if path not in best]
    for path in removable[: len(existing) - keep]:
        shutil.rmtree(path)


def best_checkpoints(folder: Path, mode: str, metric_name: str | None = None) -> list[Path]:
    """The checkpoints with a metric, the best first: the lowest (``min``) or highest (``max``), the earliest of equal ones.

    metric_name: leaves out those that were measured by another metric, before the configuration was changed.
    """
    ranked = []
    for path in list_checkpoints(folder):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            metric, name = manifest["metric"], manifest.get("metric_name")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged; resuming from it is an error
        if metric is not None and (metric_name is None or name in (None, metric_name)):
            ranked.append((metric if mode == "min" else -metric, int(path.name.split("-")[1]), path))
    return [path for _, _, path in sorted(ranked)]


def point(link: Path, target: Path) -> None:
    """Atomically make ``link`` a symbolic link to ``target`` in the same folder."""
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
    # safetensors does not store tensors that share memory, such as tied or sliced ones.
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
