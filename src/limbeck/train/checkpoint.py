"""The folders of checkpoints: complete or absent, and with checksums.

``checkpoint-<step>/`` is a Hugging Face folder (the student in safetensors, and its tokenizer). In addition it has
``training/`` with the state for resuming, and ``manifest.json`` with the size and SHA-256 of every file. A checkpoint is
written under a temporary name and renamed when it is complete. No file contains a pickle.

This module handles files and named tensors only; it does not know models, optimizers or data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.folders import TRAINING as TRAINING
from limbeck.folders import list_checkpoints as list_checkpoints
from limbeck.strategies.shards import Sliceable
from limbeck.strategies.world import World
from limbeck.train.gather import gather_json
from limbeck.train.tensor_files import fingerprint, open_shards

MANIFEST = "manifest.json"
_TEMPORARY = ".checkpoint-{}.writing"


@dataclass(frozen=True)
class Checkpoint:
    """The state from which a run resumes.

    Attributes:
        step: number of optimizer steps taken.
        masters: trained parameters in float32, by name, read when they are sliced.
        optimizer: tensors of the optimizer state, by name, likewise.
        state: JSON values, such as the position in the data.
        metric: the value that selects the best checkpoints; None if it was not measured.
    """

    step: int
    masters: Mapping[str, Sliceable]
    optimizer: Mapping[str, Sliceable]
    state: Mapping[str, Any]
    metric: float | None = None


def temporary_folder(folder: Path, step: int) -> Path:
    """Where the files of ``folder/checkpoint-<step>`` are until it is complete."""
    return folder / _TEMPORARY.format(step)


def start_checkpoint(folder: Path, step: int) -> Path:
    """Make the temporary folder of a checkpoint, and remove what an interrupted write has left.

    Returns:
        The temporary folder, which contains an empty folder ``training``.
    """
    for interrupted in folder.glob(_TEMPORARY.format("*")):
        shutil.rmtree(interrupted)
    temporary = temporary_folder(folder, step)
    (temporary / TRAINING).mkdir(parents=True)
    return temporary


def finish_checkpoint(
    temporary: Path,
    step: int,
    written: Mapping[str, Mapping[str, Any]],
    metric: float | None = None,
    metric_name: str | None = None,
) -> Path:
    """Write the manifest of a checkpoint whose files are all in ``temporary``, and give the folder its name.

    Args:
        temporary: of ``start_checkpoint``.
        step: number of optimizer steps taken.
        written: fingerprints of files that are on the disk, by path in the folder; the others are read and flushed here.
        metric: the value that selects the best checkpoints; None if it was not measured.
        metric_name: which metric that is.

    Returns:
        ``checkpoint-<step>`` beside ``temporary``.
    """
    final = temporary.with_name(f"checkpoint-{step}")
    files = {str(path.relative_to(temporary)): path for path in sorted(temporary.rglob("*")) if path.is_file()}
    manifest: dict[str, Any] = {
        "step": step,
        "metric": metric,
        "metric_name": metric_name,
        "files": {name: written.get(name) or fingerprint(path) for name, path in files.items()},
    }
    manifest["sha256"] = _own_digest(manifest)
    files[MANIFEST] = temporary / MANIFEST
    files[MANIFEST].write_text(json.dumps(manifest, indent=1))
    for name, path in files.items():
        path.chmod(0o644)  # safetensors creates files that only their owner can read
        if name not in written:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    return final


def load_checkpoint(path: Path, world: World | None = None) -> Checkpoint:
    """Open a checkpoint after comparing every file with the manifest. Collective with ``world``, whose ranks share the files
    to compare.

    Raises:
        LimbeckError: if it is damaged; the message names the newest intact checkpoint beside it.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    damage = find_damage(path, rank, size)
    if world is not None:
        damage = next(filter(None, gather_json(damage, world)), None)
    if damage is not None:
        intact = [other for other in list_checkpoints(path.parent) if other != path and find_damage(other) is None]
        advice = (
            f"resume from the newest intact checkpoint with resume_from_checkpoint: {intact[-1]}"
            if intact
            else "there is no intact checkpoint beside it, so start a new run in another output_dir"
        )
        raise LimbeckError(f"{path} is damaged ({damage}); {advice}.")
    manifest = json.loads((path / MANIFEST).read_text())
    files = [path / name for name in manifest["files"]]
    masters, optimizer = (
        open_shards(file for file in files if file.match(f"{TRAINING}/{kind}*.safetensors"))
        for kind in ("masters", "optimizer")
    )
    state = json.loads((path / TRAINING / "state.json").read_text())
    return Checkpoint(manifest["step"], masters, optimizer, state, manifest["metric"])


def find_damage(path: Path, rank: int = 0, size: int = 1) -> str | None:
    """The first difference between a checkpoint and its manifest, in words; None if it is intact.

    With ``size`` above 1, only of every ``size``-th file, beginning with number ``rank``.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["sha256"] != _own_digest(manifest):
            return f"{MANIFEST} has been changed"
        for name, expected in list(manifest["files"].items())[rank::size]:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
            if fingerprint(file) != expected:
                return f"{name} has been changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


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
    if path.resolve() not in list_checkpoints(path.resolve().parent) and list_checkpoints(path):
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


def _own_digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
