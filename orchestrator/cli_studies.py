"""Commands about studies, before anything has run: what there is, what it will take."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatmin.orchestrator.terminal import (
    ConcurrencyOption,
    JsonOption,
    OnlyOption,
    Overrides,
    SmallOption,
    StackOption,
    StudyArgument,
    YesOption,
    at_most,
    print_table,
    seconds_of,
    stack_size,
)

if TYPE_CHECKING:
    from flatmin.orchestrator.estimate import Estimate
    from flatmin.orchestrator.plan import Plan
    from flatmin.orchestrator.study import Study


def studies(
    everything: Annotated[bool, typer.Option("--all", help="Also what was published and is out of scope.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the built-in studies: what can be run, how many models, where it comes from."""
    from flatmin.orchestrator.study import builtin_studies

    rows = builtin_studies(out_of_scope=everything)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ["name", "models", "about", "source"],
        [[row[key] for key in ("name", "models", "about", "source")] for row in rows],
    )


def new(
    name: Annotated[str, typer.Argument(help="The study's name; the file is NAME.yaml.")],
    source: Annotated[
        str | None, typer.Option("--from", metavar="STUDY", help="A study to copy: a built-in one, or a YAML file.")
    ] = None,
) -> None:
    """Write a commented study that runs as it stands, to be changed."""
    from flatmin.orchestrator.template import new_study

    file = new_study(name, source)
    print(file)
    print(f"next: flatmin-sweep plan {file}", file=sys.stderr)


def schema(
    output: Annotated[str | None, typer.Option("-o", "--output", help="The file to write; printed otherwise.")] = None,
) -> None:
    """Print the JSON Schema of study files, by which editors complete and check them."""
    from flatmin.orchestrator.schema import study_schema, write_schema

    if output is None:
        print(json.dumps(study_schema(), indent=2))
        return
    print(write_schema(output))


def plan(
    study: StudyArgument,
    overrides: Overrides = None,
    small: SmallOption = False,
    only: OnlyOption = None,
    yes: YesOption = False,
    models_per_trial: StackOption = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Train some of it on this machine for a while; keep nothing.")
    ] = False,
    calibrate_budget: Annotated[str, typer.Option(help="Time for that: 60s, 10m.")] = "60s",
    concurrency: ConcurrencyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the models, trials and stacks of a study, and what it will cost; keep nothing that is trained."""
    from flatmin.orchestrator.packing import balanced_over
    from flatmin.orchestrator.plan import make_plan
    from flatmin.orchestrator.study import read_study

    checked = read_study(study, overrides or [], small=small, only=only or [], at_most=at_most(yes))
    largest = stack_size(models_per_trial)
    planned = make_plan(checked, balanced_over(checked, concurrency) if largest == "balanced" else largest)
    budget = seconds_of("--calibrate-budget", calibrate_budget) if calibrate else None
    cost = _cost(checked, planned, budget, concurrency)
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
            "device_seconds": cost.total,
            "device_seconds_low": cost.low,
            "device_seconds_high": cost.high,
            "wall_seconds": cost.wall,
            "calibrated": calibrate,
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
        f"{planned.study}: {_many(len(planned.models), 'model')} in {_many(len(planned.trials), 'trial')} of "
        f"{_span(sizes)}; {_said(cost)}"
    )
    print(f"measures: {', '.join(checked.measures) or 'none'}")


def _cost(study: Study, planned: Plan, budget: float | None, concurrency: int | None) -> Estimate:
    """Return what a plan will cost: from pilots of so many seconds, or, where there is no such budget, from counts."""
    from rich.console import Console
    from rich.progress import Progress

    if budget is None:
        from flatmin.orchestrator.estimate import estimate

        return estimate(planned.trials, study.file.resources, concurrency)
    from flatmin.orchestrator.calibrate import calibrate

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("pilots", total=None)
        return calibrate(
            planned.trials,
            study.arguments,
            study.file.resources,
            budget=budget,
            concurrency=concurrency,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )


def _shared(trial: Any) -> dict[str, Any]:
    first, *others = (model.settings for model in trial.models)
    return {name: value for name, value in first.items() if all(other[name] == value for other in others)}


def _varying(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the settings that rows which have them differ in; other plug-ins have other settings."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if len({json.dumps(row[name]) for row in rows if name in row}) > 1]


def _said(cost: Estimate) -> str:
    from flatmin.orchestrator.progress import duration

    if cost.total is None or cost.wall is None:
        return f"estimate: none, {cost.problem}"
    span = "" if cost.low is None or cost.high is None else f" ({duration(cost.low)} to {duration(cost.high)})"
    return (
        f"about {duration(cost.total)} of device time{span}, {(cost.bytes or 0) / 1e6:.1f} MB, "
        f"{duration(cost.wall)} by the clock with {cost.concurrency} at a time\nestimated {cost.basis}"
    )


def _about(seconds: float | None) -> str:
    from flatmin.orchestrator.progress import duration

    return "unknown" if seconds is None else duration(seconds)


def _span(sizes: Sequence[int]) -> str:
    return _many(sizes[0], "model") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} models"


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
