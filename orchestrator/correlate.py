"""`correlate` on a results directory or on anybody's table."""

from __future__ import annotations

from collections.abc import Sequence

from flatmin.analysis.association import MeasureCorrelation
from flatmin.analysis.correlation import Correlations, correlate
from flatmin.analysis.reading import read_table
from flatmin.bucket import BucketPath
from flatmin.errors import RequestError
from flatmin.files import place
from flatmin.orchestrator.terminal import print_table, short
from flatmin.results import Results


def correlate_table(
    table: str,
    *,
    target: str = "gen_gap",
    axes: Sequence[str] | None = None,
    measures: Sequence[str] | None = None,
    seed_column: str = "seed",
    filter: str | None = None,
    test_examples: int | None = None,
) -> Correlations:
    """Rank-correlate measures with a target.

    Args:
        table: A results directory, or a CSV, TSV or Parquet file with a row per model.
        target: The column to be predicted.
        axes: Settings that tell configurations apart; those that vary when None.
        measures: Columns or labels; all measures when None.
        seed_column: The column that tells runs of one configuration apart.
        filter: Which models count, such as `train_loss <= 0.01`.
        test_examples: The number of test examples behind a gap of accuracy, for the weights of the sign error.

    Raises:
        RequestError: No such table or column, one that is not numeric, or a filter that cannot be read.
    """
    there = place(table)
    if isinstance(there, BucketPath):
        there.reach()
    if (there / "results.json").exists():
        results = Results.open(table)
        models, sharpness = results.models(), results.sharpness()
        if models.empty:
            raise RequestError(f"'{table}' holds no trained model yet")
    else:
        models, sharpness = read_table(table), None
    return correlate(
        models,
        sharpness,
        target=target,
        axes=axes,
        measures=measures,
        seed_column=seed_column,
        filter=filter,
        test_examples=test_examples,
    )


def print_correlations(found: Correlations) -> None:
    """Print the statistics as tables, the largest tau first, controls among the measures.

    Args:
        found: The correlations of one target.
    """
    everything = dict(found.measures) | {f"{name} (control)": one for name, one in found.controls.items()}
    ranking = sorted(everything.items(), key=lambda item: -2.0 if item[1].tau is None else item[1].tau, reverse=True)
    names = ["tau", "tau_low", "tau_high", "q", "n", "n_configs", "tau_rows", "spearman", "pearson"]
    _print(names, [(name, [getattr(one, key) for key in names]) for name, one in ranking])
    names = ["partial", "partial_low", "partial_high", "sign_flip", "psi_mean", "cmi"]
    errors = ["sign error: mean", "p90", "max", "environments"]
    _print([*names, *errors], [(name, [getattr(one, key) for key in names] + _worst(one)) for name, one in ranking])
    _print(
        [f"psi {axis} (groups)" for axis in found.axes],
        [(name, [f"{short(psi.value)} ({psi.groups})" for psi in one.psi.values()]) for name, one in ranking],
    )
    names = ["tau_converged", "n_converged", "tau_all", "n_all", "seeds_to_halve"]
    predicted = [f"R^2 without {axis}" for axis in found.axes]
    _print(
        [*names, *predicted],
        [(name, [*(getattr(one, key) for key in names), *one.crossfit.values()]) for name, one in ranking],
    )
    print(f"target {found.target}; axes {', '.join(found.axes) or 'none'}; n {found.n}; dropped {dict(found.dropped)}")
    print(f"converged: {found.convergence or 'not known'}; each number is explained in docs/statistics.md")


def _worst(one: MeasureCorrelation) -> list[object]:
    (error,) = [error for error in one.sign_error if error.axis == "all"]
    return [error.mean, error.p90, error.max, error.environments]


def _print(header: Sequence[str], rows: Sequence[tuple[str, Sequence[object]]]) -> None:
    if header:
        print_table(["measure", *header], [[name, *(short(value) for value in values)] for name, values in rows])
        print()
