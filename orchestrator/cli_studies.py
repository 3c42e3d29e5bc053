"""Commands about studies, before anything has run: what there is, what it will take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from flatmin.orchestrator.terminal import (
    JsonOption,
    Overrides,
    SmallOption,
    StackOption,
    StudyArgument,
    count,
    print_table,
)


def studies(as_json: JsonOption = False) -> None:
    """List the built-in studies: what can be run, how many models, where it comes from."""
    from flatmin.orchestrator.study import builtin_studies

    rows = builtin_studies()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ["name", "models", "about", "source"],
        [[row[key] for key in ("name", "models", "about", "source")] for row in rows],
    )


def plan(
    study: StudyArgument,
    overrides: Overrides = None,
    small: SmallOption = False,
    models_per_trial: StackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the models, trials and stacks of a study, and what it will cost; train nothing."""
    from flatmin.orchestrator.estimate import estimate
    from flatmin.orchestrator.plan import make_plan
    from flatmin.orchestrator.progress import duration
    from flatmin.orchestrator.study import read_study

    checked = read_study(study, overrides or [], small=small)
    planned = make_plan(checked, count("--models-per-trial", models_per_trial))
    cost = estimate(planned.trials)
    seconds = None if cost.problem else sum(second or 0.0 for second in cost.seconds)
    shared = [_shared(trial) for trial in planned.trials]
    if as_json:
        trials = [
            {
                "trial_id": trial.trial_id,
                "model_ids": [model.model_id for model in trial.models],
                "settings": settings,
            }
            for trial, settings in zip(planned.trials, shared, strict=True)
        ]
        models = [{"model_id": model.model_id, "settings": dict(model.settings)} for model in checked.models]
        content = {
            "study": planned.study,
            "models": models,
            "trials": trials,
            "bytes": cost.bytes,
            "device_seconds": seconds,
        }
        print(json.dumps(content, indent=2))
        return
    varying = _varying(shared)
    rows = [
        [
            trial.trial_id,
            len(trial.models),
            *(settings.get(name, "") for name in varying),
            _about(second),
        ]
        for trial, settings, second in zip(planned.trials, shared, cost.seconds, strict=True)
    ]
    print_table(["trial_id", "models", *varying, "device time"], rows)
    sizes = sorted({len(trial.models) for trial in planned.trials})
    print(
        f"{planned.study}: {len(planned.models)} models in {len(planned.trials)} trials of {_span(sizes)} models; "
        + (
            f"estimate: none, {cost.problem}"
            if seconds is None
            else f"about {duration(seconds)} of device time, {(cost.bytes or 0) / 1e6:.1f} MB"
        )
    )
    print(f"measures: {', '.join(checked.measures) or 'none'}")


def _shared(trial: Any) -> dict[str, Any]:
    first, *others = (model.settings for model in trial.models)
    return {name: value for name, value in first.items() if all(other[name] == value for other in others)}


def _varying(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the settings that rows which have them differ in; other plug-ins have other settings."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if len({json.dumps(row[name]) for row in rows if name in row}) > 1]


def _about(seconds: float | None) -> str:
    from flatmin.orchestrator.progress import duration

    return "unknown" if seconds is None else duration(seconds)


def _span(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
