"""`export --to tensorboard`: an event file per model, with its scores per epoch, settings and measures.

`tensorboard --logdir FOLDER` shows them. Written with tensorboardX, which Ray Tune brings along.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flatmin.orchestrator.exporters import Run, required


def write(runs: Iterable[Run], place: Path) -> None:
    """Write the models below a folder.

    Args:
        runs: The models.
        place: The folder; each model gets one of its own in it.

    Raises:
        RequestError: tensorboardX is not installed.
    """
    board = required("tensorboardX", "tensorboard")
    for run in runs:
        with board.SummaryWriter(str(place / run.model_id)) as writer:
            for epoch, scores in run.epochs.items():
                for name, value in scores.items():
                    writer.add_scalar(name, value, epoch)
            plain = {
                name: value if isinstance(value, bool | int | float) else str(value)
                for name, value in run.settings.items()
            }
            writer.add_hparams(plain, {f"final/{name}": value for name, value in run.scores.items()}, name="final")
