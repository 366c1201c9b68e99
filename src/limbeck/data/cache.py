"""Tokenised data kept on disk under a hash of everything it depends on.

An entry is written under another name and renamed, so one that is there is whole. Of several processes that want the same
entry one makes it, and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from limbeck.data.encode import Encoder
from limbeck.data.examples import DataReport, Examples, FileReport
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from limbeck.data.sources import Input, Source

VERSION = 4
"""Raise it whenever the same input would give other arrays or another report."""

ARRAYS = ("tokens", "labels", "offsets", "supervised")
OPTIONAL_ARRAYS = ("weights", "groups")
_REMEMBERED = 1 << 26
"""Bytes from which on a file's hash is remembered; reading less again takes no time."""


def cache_key(sources: Sequence[tuple[Source, Sequence[Input]]], encoder: Encoder, cache_dir: Path) -> str:
    """The hash of the files' bytes, what is read from them and how, the tokenizer, the template and the settings."""
    contents = [
        [
            source.format,
            source.domain,
            [source.hub, source.config, source.split, source.revision],
            [[one.detail, [_sha256(file, cache_dir) for file in one.files]] for one in inputs],
        ]
        for source, inputs in sources
    ]
    tokenizer = encoder.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]  # traces of earlier calls
    settings = {**asdict(encoder.settings), "template": asdict(encoder.template), "workers": None}
    everything = [VERSION, contents, backend, tokenizer.special_tokens_map, settings]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def entry(folder: Path) -> Iterator[Path | None]:
    """A new folder to write the entry ``folder`` into, or None if it is there already, perhaps by now.

    Leaving the block without an error puts the entry in place; an error leaves nothing behind. Raises LimbeckError if
    the disk refuses.
    """
    if folder.exists():
        yield None
        return
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")) as alone:
            if folder.exists():
                yield None
                return
            if alone:  # then what lies here was left by a process that was killed
                for left in folder.parent.glob(f"{folder.name}.*"):
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
            unfinished.mkdir()
            yield unfinished
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.exists():  # it exists if another process was first, with the same content
                    raise
    except OSError as error:
        raise LimbeckError(
            f"The tokenised data cannot be kept in {folder.parent} ({error}); "
            "free some space, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load(folder: Path, names: Sequence[str]) -> tuple[Examples, DataReport]:
    """An entry, its arrays mapped into memory; ``names`` are those of the inputs, which may have moved."""
    try:
        arrays = {name: _mapped(folder / f"{name}.npy") for name in ARRAYS}
        optional = {name: folder / f"{name}.npy" for name in OPTIONAL_ARRAYS}
        arrays |= {name: _mapped(path) for name, path in optional.items() if path.exists()}
        report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        files = [FileReport(**{**file, "path": name}) for file, name in zip(report.pop("files"), names, strict=True)]
        groups = tuple((int(number), str(domain)) for number, domain in report.pop("groups"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LimbeckError(f"The cached data in {folder} is damaged ({error}); delete that folder.") from error
    bad = folder / "bad_rows.jsonl"
    report["bad_rows_file"] = str(bad) if bad.exists() else None
    return Examples(**arrays), DataReport(files=tuple(files), groups=groups, **report)


def _mapped(path: Path) -> Any:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _sha256(path: Path, cache_dir: Path) -> str:
    """The hash of a file's content. For a large one it is remembered by path, size and time of the last change."""
    try:
        facts = path.stat()
        place = str(path.resolve())
        known = [place, facts.st_size, facts.st_mtime_ns]
        memo = cache_dir / "hashes" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()}.json"
        # A file changed a moment ago may change again within the same tick of its clock.
        remember = facts.st_size >= _REMEMBERED and time.time() - facts.st_mtime > 2
        if remember:
            with suppress(OSError, ValueError):
                *remembered, digest = json.loads(memo.read_text(encoding="utf-8"))
                if remembered == known:
                    return str(digest)
        hashed = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    except OSError as error:
        raise LimbeckError(f"{path} cannot be read ({error}).") from error
    if remember:
        with suppress(OSError):  # only time is lost
            memo.parent.mkdir(parents=True, exist_ok=True)
            written = memo.with_name(f"{memo.name}.{uuid.uuid4().hex}")
            written.write_text(json.dumps([*known, hashed.hexdigest()]), encoding="utf-8")
            written.replace(memo)
    return hashed.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of an entry; False where the system or the disk has no locks, and every process works for itself."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                yield False
                return
            if not _is_still(path, file):  # who held it took it away, so it keeps nobody else out
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_still(path: Path, file: IO[str]) -> bool:
    """Whether the open ``file`` is the one that ``path`` names."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
