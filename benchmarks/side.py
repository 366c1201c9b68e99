"""Creates separate environments for the libraries that benchmarks compare with, on first use, in this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TRL = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets", "trl==1.16.0")
LIGER = ("torch==2.13.0", "liger_kernel==0.8.5")


def python_of(name: str, requirements: tuple[str, ...]) -> str:
    """The interpreter of the environment ``name`` with ``requirements``, of which the first is installed first."""
    folder = Path(__file__).parent / f".venv-{name}"
    stamp, wanted = folder / "installed.txt", "\n".join(requirements)
    python = str(folder / "bin" / "python")
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"creating the environment {folder} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirements[0]], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        stamp.write_text(wanted)
    return python
