"""Runs the Python files that the key ``plugins`` names. Each file registers its extensions with ``limbeck.registry``."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path

from limbeck.errors import LimbeckError


def load_plugin(path: str | Path) -> None:
    """Run the file, unless this process has run it before.

    Raises:
        LimbeckError: if the file does not exist, raises an exception or registers something incomplete.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise LimbeckError(f"{file} does not exist; plugins is a list of your Python files.")
    name = f"limbeck_plugin_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise LimbeckError(f"{file} is not a Python file; the files in plugins must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where compilers and dataclasses look for the source
    try:
        spec.loader.exec_module(module)
    except LimbeckError as error:
        del sys.modules[name]
        raise LimbeckError(f"{file}: {error}") from error
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise LimbeckError(f"{file} cannot be run ({type(error).__name__}: {error}); correct it.") from error
