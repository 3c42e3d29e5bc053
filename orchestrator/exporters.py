"""Results for other people's viewers: what TensorBoard, MLflow and W&B are each given of a model.

Each viewer has a file `to_<name>.py` with one function `write(runs, place)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc

from flatmin.bucket import Place
from flatmin.errors import RequestError
from flatmin.files import plain_name
from flatmin.orchestrator.inspect import opened
from flatmin.results import Results
from flatmin.tables import fixed_columns

Viewer = Literal["tensorboard", "mlflow", "wandb"]

_SCORES = tuple(name for name in fixed_columns("epochs") if name not in ("model_id", "trial_id", "epoch"))


@dataclass(frozen=True)
class Run:
    """One model, as experiment trackers see it; what is null is left out.

    Attributes:
        model_id: The model.
        study: The study's name.
        settings: Its settings.
        scores: The numbers of its row in `models`, and its measures at the end of training, by label.
        epochs: By epoch, the numbers of its row in `epochs`.
    """

    model_id: str
    study: str
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    epochs: Mapping[int, Mapping[str, float]]


def export_to(viewer: Viewer, results: Results | str | Place, place: str | Path) -> Path:
    """Write the files of another viewer for every trained model; return the folder.

    Args:
        viewer: `tensorboard`, `mlflow` or `wandb`.
        results: A results directory.
        place: The folder to write.

    Raises:
        RequestError: There is no such directory, the folder holds something, or the viewer's package is not installed.
    """
    results, place = opened(results), Path(place)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RequestError(f"'{place}' is there already; export to another folder")
    import_module(f"flatmin.orchestrator.to_{viewer}").write(runs(results), place)
    return place


def required(module: str, viewer: Viewer) -> Any:
    """Import a viewer's package.

    Raises:
        RequestError: It is not installed; says what to type.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise RequestError(f"--to {viewer}: {error}; install it with: pip install 'flatmin-sweep[{viewer}]'") from None


def runs(results: Results) -> Iterator[Run]:
    """Yield every trained model.

    Raises:
        ResultsError: A model's id, which may be in somebody else's table, would lead to another folder.
    """
    own = set(fixed_columns("models"))
    labels = set(pc.unique(results.table("sharpness")["label"]).to_pylist())
    epochs = results.table("epochs").sort_by([("model_id", "ascending"), ("epoch", "ascending")])
    counts = epochs.group_by("model_id", use_threads=False).aggregate([("epoch", "count")]).to_pylist()
    ends = list(accumulate(row["epoch_count"] for row in counts))
    spans = {
        row["model_id"]: (end - row["epoch_count"], row["epoch_count"]) for row, end in zip(counts, ends, strict=True)
    }
    for row in results.wide_table().to_pylist():
        there = {name: value for name, value in row.items() if value is not None}
        numbers = {name: value for name, value in there.items() if isinstance(value, int | float)}
        rows = epochs.slice(*spans.get(row["model_id"], (0, 0))).to_pylist()
        yield Run(
            plain_name(row["model_id"]),  # viewers name folders by it
            row["study"],
            {name: value for name, value in there.items() if name not in own | labels},
            {name: float(value) for name, value in numbers.items() if name in own | labels},
            {of["epoch"]: {name: of[name] for name in _SCORES if of[name] is not None} for of in rows},
        )
