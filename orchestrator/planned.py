"""What a plan finds in a results directory, what of it is missing there, and what is written before a launch."""

from __future__ import annotations

import json

from flatmin.compact import forget
from flatmin.files import write_atomically
from flatmin.orchestrator.plan import Missing, Plan, missing
from flatmin.orchestrator.study import Study
from flatmin.results import Results, now
from flatmin.settings import digest


def what_is_missing(results: Results, plan: Plan) -> Missing:
    """Return what of a plan is not in a results directory."""
    models = results.table("models").select(["model_id", "trial_id", "status"])
    return missing(plan, zip(*(column.to_pylist() for column in models.columns), strict=True), results.measured())


def measured_at_end_alone(results: Results, plan: Plan) -> int:
    """Return how many models of a plan that asks for measures under way were trained, and have none."""
    every = {
        model.model_id: trial.measure_every
        for trial in plan.trials
        if trial.measure_every and trial.measures
        for model in trial.models
    }
    models = results.table("models").select(["model_id", "epochs_run"]).to_pylist() if every else []
    ended = {row["model_id"]: row["epochs_run"] for row in models if row["model_id"] in every}
    rows = results.table("sharpness").select(["model_id", "epoch"]).to_pylist() if ended else []
    under_way = {row["model_id"] for row in rows if row["epoch"] < ended.get(row["model_id"], 0)}
    return sum(epochs > (every[model_id] or 0) and model_id not in under_way for model_id, epochs in ended.items())


def refused(results: Results, done: Missing) -> dict[str, str]:
    """Return the measures that could not be taken of some of the models that were missing, and why."""
    new = {model.model_id for trial in (*done.train, *done.measure) for model in trial.models}
    rows = results.table("sharpness").select(["model_id", "label", "settings"]).to_pylist() if new else []
    reasons = {
        row["label"]: json.loads(row["settings"]).get("refused")
        for row in rows
        if row["model_id"] in new and '"refused"' in row["settings"]
    }
    return dict(sorted(reasons.items()))


def write_plan(results: Results, plan: Plan, study: Study) -> None:
    """Write the plan's models and the resolved study."""
    planned_at = now()
    rows = (
        {"model_id": model.model_id, "study": plan.study, **model.settings, "planned_at": planned_at}
        for model in plan.models
    )
    name = digest([model.model_id for model in plan.models])
    if not results.table_file("plan", name).exists():
        results.write("plan", name, rows, study.arguments)
    write_atomically(results.study_file, study.to_yaml().encode())


def leave_weights_out(results: Results) -> None:
    """Write down that weights which are not there have not been lost."""
    header = {**results.check_schema(), "weights": False}
    write_atomically(results.header_file, json.dumps(header, indent=2).encode())


def train_where_weights_are_left_out(results: Results, plan: Plan) -> None:
    """Take models that lack a measure out of results that came without weights, so that they are trained again."""
    lacking = {trial.trial_id for trial in what_is_missing(results, plan).measure}
    without = [trial_id for trial_id in lacking if not results.weights_file(trial_id).exists()]
    if without:
        forget(results, "models", without)
