"""The tracker ``swanlab``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError

_NAMES = {"experiment_name": "name", "logdir": "log_dir"}
"""Earlier names of arguments, which ROLL uses, and today's."""


class SwanLab:
    """A run of SwanLab. ``kwargs`` are those of ``swanlab.init``; ``log_dir`` is by default the run's logging folder."""

    def __init__(self, log_dir: Path, kwargs: Mapping[str, Any]) -> None:
        import swanlab

        arguments = {_NAMES.get(name, name): value for name, value in kwargs.items()}
        folder = Path(arguments.pop("log_dir", None) or log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = swanlab.init(log_dir=str(folder), **arguments)

    @staticmethod
    def check(kwargs: Mapping[str, Any]) -> None:
        """Raise LimbeckError without the library, or without a login that is needed."""
        try:
            import swanlab
        except ImportError as error:
            raise LimbeckError(
                "track_with: swanlab needs the package swanlab; install it with: pip install 'limbeck[swanlab]'."
            ) from error
        settings = swanlab.Settings()  # reads the environment and what `swanlab login` has written
        if (kwargs.get("mode") or settings.mode) == "online" and not settings.api_key:
            raise LimbeckError(
                "track_with: swanlab cannot be used: there is no API key; set SWANLAB_API_KEY, run `swanlab login` once, or "
                "set SWANLAB_MODE=offline."
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_file(self, path: Path) -> None:
        """Store ``path`` with the files of the run."""
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def close(self) -> None:
        self._run.finish()
