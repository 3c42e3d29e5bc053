"""`export --to wandb`: offline runs of Weights & Biases, one per model, in a project named like the study.

Nothing is sent: `wandb sync FOLDER/wandb/offline-run-*` does that, when you type it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flatmin.orchestrator.exporters import Run, required


def write(runs: Iterable[Run], place: Path) -> None:
    """Write the models below a folder.

    Args:
        runs: The models.
        place: The folder; W&B makes its own, `wandb`, in it.

    Raises:
        RequestError: wandb is not installed.
    """
    wandb = required("wandb", "wandb")
    place.mkdir(parents=True, exist_ok=True)
    for run in runs:
        started = wandb.init(
            project=run.study,
            id=run.model_id,
            name=run.model_id,
            dir=str(place),
            mode="offline",
            config=dict(run.settings),
        )
        for epoch, scores in run.epochs.items():
            started.log(dict(scores), step=epoch)
        started.summary.update({f"final/{name}": value for name, value in run.scores.items()})
        started.finish()
