"""`export --to mlflow`: MLflow runs in an SQLite file, one per model, in an experiment named like the study.

`mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db` shows them. MLflow's names have no brackets, commas or equals
signs: those of measure labels become underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from flatmin.orchestrator.exporters import Run, required

_MOST_METRICS, _MOST_PARAMS = 1000, 100
"""Of one request to MLflow."""


def write(runs: Iterable[Run], place: Path) -> None:
    """Write the models below a folder.

    Args:
        runs: The models.
        place: The folder; MLflow's file in it is `mlflow.db`.

    Raises:
        RequestError: MLflow is not installed.
    """
    entities = required("mlflow.entities", "mlflow")
    tracking = required("mlflow.tracking", "mlflow")
    place.mkdir(parents=True, exist_ok=True)
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{place.absolute()}/mlflow.db")
    artifacts = (place.absolute() / "artifacts").as_uri()
    experiments: dict[str, str] = {}
    for run in runs:
        if run.study not in experiments:
            experiments[run.study] = client.create_experiment(run.study, artifacts)
        started = client.create_run(experiments[run.study], start_time=0, run_name=run.model_id).info.run_id
        metrics = [
            entities.Metric(_name(name), value, 0, epoch)
            for epoch, scores in run.epochs.items()
            for name, value in scores.items()
        ]
        metrics += [entities.Metric(f"final/{_name(name)}", value, 0, 0) for name, value in run.scores.items()]
        params = [entities.Param(_name(name), str(value)) for name, value in run.settings.items()]
        for first in range(0, len(metrics), _MOST_METRICS):
            client.log_batch(started, metrics=metrics[first : first + _MOST_METRICS])
        for first in range(0, len(params), _MOST_PARAMS):
            client.log_batch(started, params=params[first : first + _MOST_PARAMS])
        client.set_terminated(started)


def _name(text: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", text)
