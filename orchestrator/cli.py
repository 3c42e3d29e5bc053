"""The command line. Machine output goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from flatmin.errors import CorruptFileWarning, FlatminError, LeaseLost, RequestError, RequestWarning


class _WithSettings(TyperCommand):
    """A command whose help ends with every setting, read from the plug-ins' signatures."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the settings below the options."""
        from flatmin.reference import plain

        formatter.write(f"\n{plain()}\n")


app = typer.Typer(
    name="flatmin-sweep",
    help="Train many networks, measure how sharp their minima are, and ask which measure predicts generalisation.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A built-in study's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SETTING=VALUE[,VALUE]]...", help="Settings; several values make an axis."),
]
ResultsOption = Annotated[str, typer.Option("--results", help="The results directory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StackOption = Annotated[str | None, typer.Option("--models-per-trial", help="The largest stack: a number, or auto.")]


@app.command()
def studies(as_json: JsonOption = False) -> None:
    """List the built-in studies: what can be run, how many models, where it comes from."""
    from flatmin.orchestrator.study import builtin_studies

    rows = builtin_studies()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    _print_table(
        ["name", "models", "about", "source"],
        [[row[key] for key in ("name", "models", "about", "source")] for row in rows],
    )


@app.command(cls=_WithSettings)
def plan(
    study: StudyArgument,
    overrides: Overrides = None,
    models_per_trial: StackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the models, trials and stacks of a study, and what it will cost; train nothing."""
    from flatmin.orchestrator.estimate import estimate
    from flatmin.orchestrator.plan import make_plan
    from flatmin.orchestrator.progress import duration
    from flatmin.orchestrator.study import read_study

    checked = read_study(study, overrides or [])
    planned = make_plan(checked, _count("--models-per-trial", models_per_trial))
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
    _print_table(["trial_id", "models", *varying, "device time"], rows)
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


@app.command(cls=_WithSettings)
def launch(
    study: StudyArgument,
    results: ResultsOption,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster to join; a private one otherwise.")] = None,
    inline: Annotated[bool, typer.Option("--inline", help="Run in this process, without Ray.")] = False,
    cpus_per_trial: Annotated[float | None, typer.Option(min=0.01, help="Cores of one trial.")] = None,
    gpus_per_trial: Annotated[float | None, typer.Option(min=0.0, help="Share of a GPU of one trial.")] = None,
    models_per_trial: StackOption = None,
    max_failures: Annotated[int, typer.Option(min=0, help="How often a trial may fail and be tried again.")] = 3,
    time_budget: Annotated[str | None, typer.Option(help="Stop after this long: 90s, 30m, 2h.")] = None,
    checkpoint_every: Annotated[str, typer.Option(help="Time between checkpoints of a trial: 0s, 5m.")] = "5m",
    compile_passes: Annotated[bool, typer.Option("--compile", help="Compile training passes (torch.compile).")] = False,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="Launch a training pass as one graph.")] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Keep images channels last: faster convolutions on some devices.")
    ] = False,
    micro_batch: Annotated[
        str | None,
        typer.Option(help="The most examples of each model in one pass: a number, or auto for as many as fit."),
    ] = None,
    processes_per_model: Annotated[
        int, typer.Option(min=1, help="Processes that train one model together, each on a GPU of its own.")
    ] = 1,
) -> None:
    """Run a study, or whatever of it is missing."""
    from flatmin.orchestrator.launch import LaunchOptions
    from flatmin.orchestrator.launch import launch as run
    from flatmin.orchestrator.runner import RunOptions

    options = LaunchOptions(
        run=RunOptions(
            max_failures=max_failures,
            time_budget=None if time_budget is None else seconds_of("--time-budget", time_budget),
            address=address,
            cpus_per_trial=cpus_per_trial,
            gpus_per_trial=gpus_per_trial,
            processes_per_model=processes_per_model,
        ),
        inline=inline,
        models_per_trial=_count("--models-per-trial", models_per_trial),
        checkpoint_seconds=seconds_of("--checkpoint-every", checkpoint_every),
        compile=compile_passes,
        cuda_graphs=cuda_graphs,
        channels_last=channels_last,
        micro_batch=_count("--micro-batch", micro_batch),
    )
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        done = run(study, results, overrides or [], options, console)
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept, run the same command to go on", highlight=False)
        raise typer.Exit(130) from None
    if not done.trained and not done.measured and not done.remaining:
        console.print(f"all {done.planned} models are there; nothing was trained", highlight=False)
    else:
        measured = f", {done.measured} measured from saved weights" if done.measured else ""
        console.print(
            f"{done.trained} models trained{measured}, {done.remaining} of {done.planned} remain",
            highlight=False,
        )
    if done.remaining:
        reason = "the time budget is spent" if done.out_of_time else "see the table failures"
        console.print(f"[yellow]{reason}; run the same command to go on", highlight=False)
    raise typer.Exit(done.exit_code)


@app.command()
def status(results: ResultsOption, as_json: JsonOption = False) -> None:
    """Count a study's models: planned, trained, failed, remaining; rate and time left."""
    from flatmin.orchestrator.inspect import status as count
    from flatmin.orchestrator.progress import duration
    from flatmin.results import Results

    found = count(Results.open(results)).to_json()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    shown: dict[str, object] = dict(found)
    shown["models_per_minute"] = "" if found["models_per_minute"] is None else f"{found['models_per_minute']:.1f}"
    shown["eta_seconds"] = "" if found["eta_seconds"] is None else duration(found["eta_seconds"])
    _print_table(["", ""], [[name.replace("_seconds", ""), value] for name, value in shown.items()])


@app.command()
def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="A query over the tables and the view wide.")],
    results: ResultsOption,
    output_format: Annotated[Literal["table", "csv", "json", "parquet"], typer.Option("--format")] = "table",
) -> None:
    """Ask the tables a question in SQL (DuckDB)."""
    from flatmin.orchestrator.inspect import query as ask
    from flatmin.results import Results

    frame = ask(Results.open(results), sql)
    if output_format == "csv":
        print(frame.to_csv(index=False), end="")
    elif output_format == "json":
        print(frame.to_json(orient="records", date_format="iso", indent=2))
    elif output_format == "parquet":
        frame.to_parquet(sys.stdout.buffer, index=False)
    else:
        _print_table([str(name) for name in frame.columns], frame.itertuples(index=False))


@app.command()
def measure(
    results: ResultsOption,
    measures: Annotated[str, typer.Option(help="Measures to compute, such as `lpf,lpf(sigma=0.002)`.")],
    inline: Annotated[bool, typer.Option("--inline", help="Run in this process, without Ray.")] = False,
    max_failures: Annotated[int, typer.Option(min=0, help="How often a trial may fail and be tried again.")] = 3,
) -> None:
    """Compute measures of trained models from their saved weights; retrain nothing."""
    from flatmin.labels import split_list
    from flatmin.orchestrator.launch import LaunchOptions
    from flatmin.orchestrator.launch import measure as run
    from flatmin.orchestrator.runner import RunOptions

    console = Console(stderr=True)
    options = LaunchOptions(run=RunOptions(max_failures=max_failures), inline=inline)
    done = run(results, split_list(measures), options, console)
    console.print(f"{done.measured} models measured, {done.remaining} remain", highlight=False)
    raise typer.Exit(done.exit_code)


@app.command()
def correlate(
    table: Annotated[
        str, typer.Argument(metavar="TABLE_OR_RESULTS", help="A CSV or Parquet file, or a results directory.")
    ],
    target: Annotated[str, typer.Option(help="What the measures should predict.")] = "gen_gap",
    axes: Annotated[str | None, typer.Option(help="Settings that tell configurations apart.")] = None,
    measures: Annotated[str | None, typer.Option(help="Columns or labels to correlate.")] = None,
    seed_column: Annotated[str, typer.Option(help="The column that tells runs of a configuration apart.")] = "seed",
    as_json: JsonOption = False,
) -> None:
    """Rank-correlate measures with a target, over any table of models."""
    from flatmin.labels import split_list
    from flatmin.orchestrator.correlate import correlate_table

    found = correlate_table(
        table,
        target=target,
        axes=None if axes is None else split_list(axes),
        measures=None if measures is None else split_list(measures),
        seed_column=seed_column,
    )
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    keys = ["tau", "tau_low", "tau_high", "n", "n_configs", "tau_rows", "spearman", "pearson"]
    rows = [[name, *(_short(getattr(values, key)) for key in keys)] for name, values in found.measures.items()]
    _print_table(["measure", *keys], rows)
    axes_used = ", ".join(found.axes) or "none"
    print(f"target {found.target}; axes {axes_used}; n {found.n}; dropped {dict(found.dropped)}")


@app.command()
def report(
    results: ResultsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained interactive page that opens without a network."""
    from flatmin.orchestrator.report import write_report

    write_report(results, output)
    print(output)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what works on this machine, what does not, and the mend."""
    from dataclasses import asdict

    from flatmin.orchestrator.doctor import doctor as examine

    checks = examine()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        rows = [
            ["ok" if check.ok else "BROKEN", check.check, check.found, check.mend.partition("\n")[0]]
            for check in checks
        ]
        _print_table(["", "check", "found", "mend"], rows)
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


_TIMES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(option: str, text: str) -> float:
    """Return a time given as `90s`, `30m`, `2h` or a number of seconds.

    Raises:
        RequestError: It is none of these.

    >>> seconds_of("--time-budget", "1.5m")
    90.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smhd]?)\s*", text)
    if match is None:
        raise RequestError(f"{option} {text}: not a time; write 90s, 30m, 2h or 1d")
    return float(match.group(1)) * _TIMES[match.group(2) or "s"]


def _count(option: str, text: str | None) -> int | Literal["auto"] | None:
    if text is None or text == "auto":
        return None if text is None else "auto"
    if not text.isdigit() or int(text) < 1:
        raise RequestError(f"{option} {text}: should be a number from 1 on, or auto")
    return int(text)


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


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    import pandas as pd

    table = Table(*header, show_header=any(header), box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            *("" if pd.api.types.is_scalar(value) and pd.isna(value) else escape(str(value)) for value in row)
        )
    # A pipe has no width of its own: whole cells are worth more there than lines of 80 characters.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _tell_warnings() -> None:
    """Tell the user, once, of every file that is left out and every doubt about a request; no other warning."""
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, CorruptFileWarning | RequestWarning) and str(message) not in told:
            told.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def main() -> None:
    """Run the command line; every mistake of the caller's ends in a line, not in a traceback."""
    _tell_warnings()
    try:
        app()
    except LeaseLost as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except FlatminError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
