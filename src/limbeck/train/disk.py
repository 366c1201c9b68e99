"""Errors of the disk under the files of a run, such as a full disk, as sentences."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from limbeck.errors import LimbeckError
from limbeck.train.checkpoint import list_checkpoints

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that only writing has."""
ANY = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTDIR)
"""Errors of a block that only writes."""


@contextmanager
def explain_disk_errors(what: str, checkpoints: Path, errors: Collection[int] = ANY) -> Iterator[None]:
    """Turn an error of the disk inside the block into a LimbeckError: "``what`` cannot be written: …", which names the
    last whole checkpoint.

    Args:
        what: what the block writes.
        checkpoints: folder of the checkpoints of the run.
        errors: the numbers of the operating system's errors that are explained.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in errors:
            raise
        existing = list_checkpoints(checkpoints)
        after = (
            f"then continue from {existing[-1]} with resume_from_checkpoint: true"
            if existing
            else "then start again, since no checkpoint was written yet"
        )
        raise LimbeckError(
            f"{what} cannot be written: {os.strerror(error.errno)}; make room there or correct the path, {after}."
        ) from error
