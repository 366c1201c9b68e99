"""Cache of tokenised data on disk, under a hash of everything that it depends on.

An entry is written under a temporary name and renamed, so an existing entry is complete. If several processes need the same
entry, one makes it and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
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

VERSION = 5
"""Increase it whenever the same input gives other arrays or another report."""

ARRAYS = ("tokens", "labels", "offsets", "supervised")
OPTIONAL_ARRAYS = ("weights", "groups", "columns", "column_ends", "teacher_prompts", "teacher_prompt_ends")
_REMEMBERED = 1 << 26
"""File size in bytes above which what was computed of a file is kept; smaller files are read again each time."""


def cache_key(sources: Sequence[tuple[Source, Sequence[Input]]], encoder: Encoder, cache_dir: Path) -> str:
    """Returns the hash of the files' bytes, how they are read, the tokenizer, the template and the settings."""
    contents = [
        [
            source.format,
            source.domain,
            [source.hub, source.config, source.split, source.revision],
            [source.question_key, source.answer_key],
            [[one.detail, [_sha256(file, cache_dir) for file in one.files]] for one in inputs],
        ]
        for source, inputs in sources
    ]
    tokenizer = encoder.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]  # set by earlier calls
    settings = {**asdict(encoder.settings), "template": asdict(encoder.template), "workers": None}
    everything = [VERSION, contents, backend, tokenizer.special_tokens_map, settings]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def entry(folder: Path) -> Iterator[Path | None]:
    """Yields a new folder to write the entry into, or None if ``folder`` exists, possibly after waiting for its maker.

    If the block ends without an error, the folder is renamed to ``folder``; otherwise it is removed. Raises LimbeckError if
    the disk cannot be written.
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
            if alone:  # then other temporary folders were left by a process that was killed
                for left in folder.parent.glob(f"{folder.name}.*"):
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
            unfinished.mkdir()
            yield unfinished
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.exists():  # another process made the same entry first
                    raise
    except OSError as error:
        raise LimbeckError(
            f"The tokenised data cannot be kept in {folder.parent} ({error}); "
            "free some space, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load(folder: Path, names: Sequence[str]) -> tuple[Examples, DataReport]:
    """Loads an entry with memory-mapped arrays. ``names`` are the current names of the inputs, which may have moved."""
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
    """Returns the hash of a file's content."""

    def hash_content() -> str:
        hashed = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
        return hashed.hexdigest()

    return str(remembered(path, cache_dir, "hashes", hash_content))


def remembered(path: Path, cache_dir: Path, kind: str, compute: Callable[[], Any]) -> Any:
    """Returns ``compute()``, a JSON value that depends on the content of a file.

    That of a large file is kept by path, size and modification time.
    """
    try:
        facts = path.stat()
        place = str(path.resolve())
        known = [place, facts.st_size, facts.st_mtime_ns]
        memo = cache_dir / kind / f"{hashlib.sha256(os.fsencode(place)).hexdigest()}.json"
        # A file that was just modified may change again without a new modification time.
        remember = facts.st_size >= _REMEMBERED and time.time() - facts.st_mtime > 2
        if remember:
            with suppress(OSError, ValueError):
                *of_file, value = json.loads(memo.read_text(encoding="utf-8"))
                if of_file == known:
                    return value
        value = compute()
    except OSError as error:
        raise LimbeckError(f"{path} cannot be read ({error}).") from error
    if remember:
        with suppress(OSError):  # without it the value is computed again
            memo.parent.mkdir(parents=True, exist_ok=True)
            written = memo.with_name(f"{memo.name}.{uuid.uuid4().hex}")
            written.write_text(json.dumps([*known, value]), encoding="utf-8")
            written.replace(memo)
    return value


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock of an entry. Yields False if the system or the disk has no locks; then every process makes the entry."""
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
            if not _is_still(path, file):  # its last holder deleted the file, so this lock excludes no other process
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_still(path: Path, file: IO[str]) -> bool:
    """Returns whether ``path`` still names the open ``file``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
