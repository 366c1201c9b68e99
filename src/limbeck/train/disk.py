"""Errors of the disk under the files of a run, such as a full disk, as sentences."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from limbeck.errors import LimbeckError
from limbeck.train.checkpoint import list_checkpoints

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that only writing has."""
ANY = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTDIR)
"""Errors of a block that only writes."""


@contextmanager
def explain_disk_errors(what: str, checkpoints: Path, errors: Collection[int] = ANY) -> Iterator[None]:
    """Turn an error of the disk inside the block into a LimbeckError: "``what`` cannot be written: …".

    The half-written checkpoint is removed, and the message names the last whole one.

    Args:
        what: what the block writes.
        checkpoints: folder of the checkpoints of the run.
        errors: the numbers of the operating system's errors that are explained.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _reason(error, errors)
        if reason is None:
            raise
        remove_unfinished(checkpoints)
        existing = list_checkpoints(checkpoints)
        after = (
            f"then continue from {existing[-1]} with resume_from_checkpoint: true"
            if existing
            else "then start again, since no checkpoint was written yet"
        )
        raise LimbeckError(
            f"{what} cannot be written: {reason}; make room there or correct the path, {after}."
        ) from error


def _reason(error: OSError | SafetensorError, errors: Collection[int]) -> str | None:
    if isinstance(error, SafetensorError):  # has the text of the operating system, but not its number
        return next((os.strerror(number) for number in errors if f"(os error {number})" in str(error)), None)
    return os.strerror(error.errno) if error.errno is not None and error.errno in errors else None


def remove_unfinished(folder: Path) -> None:
    """Remove the checkpoints that were not completed. The caller holds the lock of the run, so nobody writes them."""
    for path in folder.glob(".checkpoint-*.writing"):
        shutil.rmtree(path, ignore_errors=True)
