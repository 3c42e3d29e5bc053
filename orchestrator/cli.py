"""The command line. Machine output goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from flatmin.errors import CorruptFileWarning, FlatminError, LeaseLost, RequestWarning
from flatmin.orchestrator.cli_results import compact, correlate, export, import_, query, replay, report, status
from flatmin.orchestrator.cli_studies import new, plan, schema, studies
from flatmin.orchestrator.terminal import (
    ConcurrencyOption,
    JsonOption,
    OnlyOption,
    Overrides,
    ResultsOption,
    SmallOption,
    StackOption,
    StudyArgument,
    WithSettings,
    YesOption,
    at_most,
    count,
    print_table,
    seconds_of,
    stack_size,
)


def launch(
    study: StudyArgument,
    results: ResultsOption,
    overrides: Overrides = None,
    small: SmallOption = False,
    only: OnlyOption = None,
    yes: YesOption = False,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster to join; a private one otherwise.")] = None,
    inline: Annotated[bool, typer.Option("--inline", help="Run in this process, without Ray.")] = False,
    cpus_per_trial: Annotated[float | None, typer.Option(min=0.01, help="Cores of one trial.")] = None,
    gpus_per_trial: Annotated[float | None, typer.Option(min=0.0, help="Share of a GPU of one trial.")] = None,
    models_per_trial: StackOption = None,
    concurrency: ConcurrencyOption = None,
    stacks_per_gpu: Annotated[
        str | None,
        typer.Option(help="Trials that share a GPU: a number, or auto for as many as its memory holds."),
    ] = None,
    max_failures: Annotated[int, typer.Option(min=0, help="How often a trial may fail and be tried again.")] = 3,
    time_budget: Annotated[str | None, typer.Option(help="Stop after this long: 90s, 30m, 2h.")] = None,
    hang_timeout: Annotated[
        str, typer.Option(help="End a trial that shows no sign of life for so long, and try it again; 0s: never.")
    ] = "30m",
    checkpoint_every: Annotated[str, typer.Option(help="Time between checkpoints of a trial: 0s, 5m.")] = "5m",
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Keep the trained weights, which later measures need.")
    ] = True,
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
            hang_timeout=seconds_of("--hang-timeout", hang_timeout),
        ),
        inline=inline,
        models_per_trial=stack_size(models_per_trial),
        concurrency=concurrency,
        stacks_per_gpu=count("--stacks-per-gpu", stacks_per_gpu),
        checkpoint_seconds=seconds_of("--checkpoint-every", checkpoint_every),
        weights=weights,
        compile=compile_passes,
        cuda_graphs=cuda_graphs,
        channels_last=channels_last,
        micro_batch=count("--micro-batch", micro_batch),
    )
    console = Console(stderr=True)
    with _interruptible(console):
        done = run(
            study, results, overrides or [], options, console, small=small, only=only or [], at_most=at_most(yes)
        )
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
    with _interruptible(console):
        done = run(results, split_list(measures), options, console)
    console.print(f"{done.measured} models measured, {done.remaining} remain", highlight=False)
    raise typer.Exit(done.exit_code)


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
        print_table(["", "check", "found", "mend"], rows)
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


app = typer.Typer(
    name="flatmin-sweep",
    help="Train many networks, measure how sharp their minima are, and ask which measure predicts generalisation.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    studies,
    new,
    schema,
    plan,
    launch,
    status,
    query,
    compact,
    measure,
    correlate,
    report,
    export,
    import_,
    replay,
    doctor,
):
    name = command.__name__.rstrip("_")  # `import` is no name for a function
    app.command(name, cls=WithSettings if command in (plan, launch) else None)(command)


@contextlib.contextmanager
def _interruptible(console: Console) -> Iterator[None]:
    """Let an interrupt or SIGTERM end what runs in order, with a word on how to go on and exit code 130."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept, run the same command to go on", highlight=False)
        raise typer.Exit(130) from None


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
    except OSError as error:
        if error.filename is None:
            raise
        print(f"'{error.filename}': {error.strerror}", file=sys.stderr)
        sys.exit(2)
