"""Reads the files of Megatron's checkpoints that are pickles, without running anything that they name.

``.metadata`` of torch.distributed.checkpoint, ``common.pt`` and legacy files hold plain values, tensors and objects of a few
classes. An object becomes a ``Record`` of its attributes, whatever its class; a class that these files do not have is an
error.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
    safe_globals,
)

from limbeck.errors import LimbeckError

_IN_METADATA = ("torch.distributed.checkpoint.", "megatron.core.", "collections.OrderedDict", "_io.BytesIO", "pathlib.")
_IN_FILES = (
    *("argparse.Namespace", "types.SimpleNamespace", "_io.BytesIO", "signal.Signals", "pathlib.", "datetime."),
    *("numpy.", "megatron.", "transformer_engine"),
)
"""Beginnings of the names of classes that Megatron stores, of which no code runs."""


class Record:
    """An object of a file: its attributes, or ``arguments`` and ``state`` where it was stored with these."""

    def __new__(cls, *arguments: Any) -> Record:
        record = object.__new__(cls)
        record.__dict__["arguments"] = arguments
        return record

    def __init__(self, *arguments: Any) -> None:
        """The attributes come later, from ``__setstate__``."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _MetadataUnpickler(pickle.Unpickler):
    """Builds records, tuples for ``torch.Size``, and PyTorch's data types; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "torch.Size":
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if full.startswith(_IN_METADATA) or full == "torch.serialization._get_layout":
            return Record
        raise pickle.UnpicklingError(f"it holds a {full}")


def read_metadata(path: Path) -> Any:
    """The index of a torch.distributed.checkpoint.

    Raises:
        LimbeckError: if it is damaged, or holds anything but an index.
    """
    try:
        return _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle raises anything
        raise LimbeckError(
            f"{path} is not the index of a checkpoint of torch.distributed.checkpoint ({error}); copy the checkpoint again, "
            "and do not load it from a source that you do not trust."
        ) from error


@contextmanager
def _without_allowed_classes() -> Iterator[None]:
    """Take back the classes that ``torch.load`` may build for other libraries, which would not become a ``Record``."""
    allowed = get_safe_globals()
    clear_safe_globals()
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(allowed)


def read_torch_file(path: Path, part: tuple[int, int] | None = None) -> Any:
    """What ``torch.save`` wrote; tensors stay in the file until they are read.

    part: first byte and number of bytes, if it is only a part of the file.

    Raises:
        LimbeckError: if it is damaged, or holds objects of other classes than Megatron stores.
    """
    try:
        with _without_allowed_classes():
            names = get_unsafe_globals_in_checkpoint(_source(path, part))
            odd = sorted(name for name in names if not name.startswith(_IN_FILES))
            if odd:
                raise LimbeckError(
                    f"{path} holds a {odd[0]}, which would have to be unpickled, and that can run any code; load the "
                    "checkpoint with Megatron-LM and save it with --ckpt-format torch_dist."
                )
            with safe_globals([(Record, name) for name in names]):
                return torch.load(_source(path, part), map_location="cpu", weights_only=True, mmap=part is None)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise LimbeckError(
            f"{path} is damaged or no file of torch.save ({reason(error)}); copy the checkpoint again."
        ) from error


def _source(path: Path, part: tuple[int, int] | None) -> Any:
    """What PyTorch reads from: the name of the file, or some of its bytes."""
    if part is None:
        return str(path)
    with path.open("rb") as file:
        file.seek(part[0])
        return io.BytesIO(file.read(part[1]))


def reason(error: Exception) -> str:
    """The first line of an error without its full stop, or its class if it has no words."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
