"""Python files of the user's that a configuration names: run once, so that they register divergences and trackers."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path

from limbeck.errors import LimbeckError


def load_plugin(path: str | Path) -> None:
    """Run the file unless this process has; raises LimbeckError if it is missing or fails."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise LimbeckError(f"{file} does not exist; plugins names Python files of yours.")
    name = f"limbeck_plugin_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise LimbeckError(f"{file} is not a Python file; plugins names files that end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where compilers and dataclasses look for the source
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise LimbeckError(f"{file} cannot be run ({type(error).__name__}: {error}); correct it.") from error
