"""Replay: train one model again, alone, in this process, and set what it gives beside its row.

A model that was trained alone, with as many threads on the same machine, must come out the same to the last bit. In a
stack of another size sums are taken in another order: in float64 losses agree to about 1e-9 over some tens of
steps, in float32 training may drift apart, as two machines' would.
"""

from __future__ import annotations

import difflib
import json
import math
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from flatmin.bucket import Place
from flatmin.errors import RequestError, RequestWarning
from flatmin.lease import Lease
from flatmin.orchestrator.grid import NAMES
from flatmin.orchestrator.inline import run_inline
from flatmin.orchestrator.inspect import opened
from flatmin.orchestrator.launch import settings_of
from flatmin.orchestrator.progress import Display
from flatmin.orchestrator.runner import RunOptions
from flatmin.plugins import program_arguments
from flatmin.results import Results
from flatmin.settings import model_id as model_id_of
from flatmin.trial import Execution, Job, Model, Trial

COMPARED = (
    "status",
    "epochs_run",
    "train_loss",
    "train_acc",
    "val_loss",
    "val_acc",
    "test_loss",
    "test_acc",
    "gen_gap",
    "loss_gap",
    "label_flip_rate",
)
"""Columns of `models/` that depend on nothing but the model's settings."""


@dataclass(frozen=True)
class Replayed:
    """What a model's row says and what training it again gave.

    Attributes:
        model_id: The model.
        stack_size: Models that were trained together when its row was made.
        stored, replayed: Values of `COMPARED`, and of the measures at the end of training by label.
    """

    model_id: str
    stack_size: int
    stored: Mapping[str, Any]
    replayed: Mapping[str, Any]

    @property
    def identical(self) -> bool:
        """Whether all values are the same to the last bit."""
        return dict(self.stored) == dict(self.replayed)

    def to_json(self) -> dict[str, Any]:
        """Return both, and the differences where they are numbers."""
        return {
            "model_id": self.model_id,
            "stack_size": self.stack_size,
            "identical": self.identical,
            "values": {
                name: {"stored": value, "replayed": self.replayed.get(name), "difference": self.difference(name)}
                for name, value in self.stored.items()
            },
        }

    def difference(self, name: str) -> float | None:
        """Return replayed - stored, or None where one of them is no number."""
        pair = (self.replayed.get(name), self.stored[name])
        if any(isinstance(value, str) or value is None or not math.isfinite(value) for value in pair):
            return None
        return float(pair[0] - pair[1])


def replay(results: Results | str | Place, model_id: str, console: Console | None = None) -> Replayed:
    """Train one model of a results directory again, alone, in this process; the directory is not written.

    Args:
        results: The results directory.
        model_id: The model's id, or the beginning of it that no other has.
        console: Where progress is shown; the standard error when None.

    Raises:
        RequestError: There is no such model, or several begin so.
        FlatminError: Its data are not here, or it failed; the message is its own.
    """
    results = opened(results)
    row = _row_of(results, model_id)
    ended = [
        found
        for found in results.table("sharpness").to_pylist()
        if (found["model_id"], found["epoch"]) == (row["model_id"], row["epochs_run"])
    ]
    model = Model(row["model_id"], _settings_of(row))
    trial = Trial(row["study"], (model,), tuple(found["label"] for found in ended))
    with tempfile.TemporaryDirectory(prefix="flatmin-") as folder:
        scratch = Results.create(Path(folder), row["study"])
        with Lease(scratch) as lease, Display(console or Console(stderr=True), 1, 0) as display:
            job = Job(trial, str(scratch.path), lease.token, Execution())
            run_inline(scratch, [job], RunOptions(max_failures=0), display)
        again = scratch.table("models").to_pylist()
        if not again:
            failures = scratch.table("failures").to_pylist()
            raise RequestError(f"model {row['model_id']} was not trained: {failures[-1]['error'] if failures else ''}")
        measured = {found["label"]: found["value"] for found in scratch.table("sharpness").to_pylist()}
    execution = json.loads(row["execution"] or "{}")
    return Replayed(
        row["model_id"],
        int(execution.get("stack_size", 1)),
        {**{name: row[name] for name in COMPARED}, **{found["label"]: found["value"] for found in ended}},
        {**{name: again[0][name] for name in COMPARED}, **measured},
    )


def _settings_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's settings; warn where they are not those that it was named by."""
    settings = settings_of(row)
    if model_id_of(settings, program_arguments({name: settings[name] for name in NAMES})) != row["model_id"]:
        warnings.warn(
            f"the settings in the row of model {row['model_id']} do not give this id: the row was changed, or its "
            "plug-ins take other settings by now; what is replayed is the row",
            RequestWarning,
            stacklevel=3,
        )
    return settings


def _row_of(results: Results, model_id: str) -> dict[str, Any]:
    rows = results.table("models").to_pylist()
    found = [row for row in rows if row["model_id"].startswith(model_id)]
    if len(found) == 1:
        return dict(found[0])
    if found:
        raise RequestError(f"'{model_id}': {len(found)} models begin so, {found[0]['model_id']} among them")
    if model_id in results.table("plan")["model_id"].to_pylist():
        raise RequestError(f"'{model_id}' is planned, and not trained yet")
    close = difflib.get_close_matches(model_id, [row["model_id"] for row in rows], n=1)
    hint = f"did you mean '{close[0]}'?" if close else 'query "SELECT model_id FROM models" lists them'
    raise RequestError(f"'{model_id}': no trained model has this id; {hint}")
