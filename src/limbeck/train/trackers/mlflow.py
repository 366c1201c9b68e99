"""The tracker ``mlflow``."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.train.trackers import explain

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_REFUSED = re.compile(r"[^\w\-. :/]")  # characters that MLflow does not allow in the name of a metric


class MLflow:
    """A run of MLflow. ``kwargs``: ``tracking_uri``, by default MLFLOW_TRACKING_URI; ``experiment_name`` and
    ``artifact_location`` of the experiment, which is made if it does not exist; ``run_name``, or ``run_id`` of a run that
    goes on.
    """

    def __init__(self, log_dir: Path, kwargs: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(kwargs.get("tracking_uri"))
        if kwargs.get("run_id"):
            self._run = str(kwargs["run_id"])
            self._client.update_run(self._run, status="RUNNING")
            return
        name = str(kwargs.get("experiment_name") or "limbeck")
        found = self._client.get_experiment_by_name(name)
        experiment = (
            self._client.create_experiment(name, kwargs.get("artifact_location"))
            if found is None
            else found.experiment_id
        )
        self._run = self._client.create_run(experiment, run_name=kwargs.get("run_name")).info.run_id

    @staticmethod
    def check(kwargs: Mapping[str, Any]) -> None:
        """Raise LimbeckError without the library, or if it cannot use the place of the runs."""
        try:
            import mlflow
        except ImportError as error:
            raise LimbeckError(
                "track_with: mlflow needs the package mlflow-skinny; install it with: pip install 'limbeck[mlflow]'."
            ) from error
        uri = str(kwargs.get("tracking_uri") or mlflow.get_tracking_uri())
        if uri.startswith(_DATABASES):
            if find_spec("sqlalchemy") is None:
                kind = uri.partition(":")[0]
                raise LimbeckError(
                    f"track_with: mlflow would store its runs with {kind}, which needs the whole package mlflow; install it, "
                    "or set MLFLOW_TRACKING_URI or tracker_kwargs.tracking_uri to a server."
                )
            return
        try:
            mlflow.MlflowClient(uri)
        except mlflow.MlflowException as error:
            raise LimbeckError(f"track_with: mlflow cannot be used: {explain(error)}.") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_REFUSED.sub("_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def log_file(self, path: Path) -> None:
        """Store ``path`` as an artifact of the run."""
        self._client.log_artifact(self._run, str(path))

    def close(self) -> None:
        self._client.set_terminated(self._run)
