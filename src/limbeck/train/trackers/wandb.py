"""The tracker ``wandb``: Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.train.trackers import explain


class WandB:
    """A run of Weights & Biases. ``kwargs`` are those of ``wandb.init``, and ``log_dir`` in place of ``dir``."""

    def __init__(self, log_dir: Path, kwargs: Mapping[str, Any]) -> None:
        import wandb

        arguments = dict(kwargs)
        folder = Path(arguments.pop("log_dir", None) or log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(dir=str(folder), **arguments)

    @staticmethod
    def check(kwargs: Mapping[str, Any]) -> None:
        """Raise LimbeckError without the library, or without a login that is needed."""
        try:
            import wandb
        except ImportError as error:
            raise LimbeckError(
                "track_with: wandb needs the package wandb; install it with: pip install 'limbeck[wandb]'."
            ) from error
        if (kwargs.get("mode") or os.environ.get("WANDB_MODE")) in ("offline", "disabled", "dryrun"):
            return
        try:
            wandb.login(verify=False)  # on a terminal, it prompts for the key
        except wandb.errors.Error as error:
            raise LimbeckError(
                f"track_with: wandb cannot be used: {explain(error)}; set WANDB_API_KEY, or WANDB_MODE=offline."
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_file(self, path: Path) -> None:
        """Store ``path`` as an artifact of the run."""
        import wandb

        artifact = wandb.Artifact(f"{path.stem}-{self._run.id}", type=path.stem)
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()
