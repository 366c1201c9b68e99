"""Rules for the names of files and folders: a name that no file can have is an error before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.config.schema.base import Contradiction

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields

_LONGEST_NAME = 255  # bytes, on the file systems of Linux and macOS


def path_contradictions(config: RunFields) -> Iterator[Contradiction]:
    """Errors in the values of keys that name files or folders."""
    data, resume = config.student.data_args, config.resume_from_checkpoint
    names: list[tuple[str, str | None]] = [
        ("output_dir", config.output_dir),
        ("logging_dir", config.logging_dir),
        ("checkpoint_config.output_dir", config.checkpoint_config.output_dir),
        ("resume_from_checkpoint", resume if isinstance(resume, str) else None),
        ("student.model_args.model_name_or_path", config.student.model_args.model_name_or_path),
        ("teacher.model_args.model_name_or_path", config.teacher.model_args.model_name_or_path),
        ("tokenizer", config.tokenizer),
        ("student.data_args.cache_path", data.cache_path),
        ("student.data_args.prompt_file", data.prompt_file),
    ]
    for role, args, sources in (
        ("student", data, config.data_sources),
        ("validation", config.effective_validation.data_args, config.validation_sources),
    ):
        key = f"{role}.data_args.{'sources' if args is not None and args.sources else 'file_name'}"
        names += [(key, name) for source in sources for name in source.path or ()]
    for key, name in names:
        if name is not None and (fault := path_fault(name)) is not None:
            yield Contradiction(key, f"= {name[:30]!a} cannot be the name of a file or folder: {fault}")


def path_fault(name: str) -> str | None:
    """Why no file can have this name; None if one can."""
    if "\0" in name:
        return "it contains the character NUL"
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        return "it contains half a surrogate pair"
    if max(map(len, parts)) > _LONGEST_NAME:
        return f"a part of it is longer than {_LONGEST_NAME} bytes"
    return None
