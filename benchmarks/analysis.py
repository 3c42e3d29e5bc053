"""Every statistic of 5,000 models, 25 measures and 5 axes, against direct implementations on the same table in one run.

The whole of `correlate`: tau with 1,000 bootstrap resamples of configurations, partial correlation with its own, Psi,
CMI, sign error, cross-fit, q-values and two controls. Once with five seeds of 1,000 configurations, and once with 5,000
configurations of one model each, which is 25 times the pairs.

Direct implementations are what a paper's script does: `scipy.stats.kendalltau` of every resample; sign errors in two
loops over rows, as published (Dziugaite et al. 2020), with the loop over measures inside; matrices of all pairs and a
table of counts for the mutual information. They are timed on a part (so many resamples, rows, configurations of one
measure), and the time is multiplied up to the whole; on that part they have to agree with ours. Prints CPU seconds and
their ratio; of everything the wall-clock seconds too, which other programs make longer, and the load.

    python benchmarks/analysis.py
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from _figures import show
from rich.table import Table
from scipy import stats

from flatmin.analysis import bootstrap, conditional, configurations, kendall, sign_error
from flatmin.analysis.configurations import Floats, Ints
from flatmin.analysis.correlation import correlate

AXES = {"lr": 5, "width": 5, "momentum": 5, "batch_size": 4, "weight_decay": 2}
MEASURES, RESAMPLES, TEST_EXAMPLES = 25, 1000, 10_000
PART_RESAMPLES, PART_ROWS, PART_CONFIGURATIONS = 20, 250, 300


def models(seeds: int) -> pd.DataFrame:
    """Make 5,000 models: a full grid of 1,000 configurations with five seeds, or 5,000 of a finer one."""
    rng = np.random.default_rng(0)
    levels = dict(AXES) if seeds > 1 else AXES | {"lr": 25}
    grid = pd.DataFrame(list(itertools.product(*(range(size) for size in levels.values()))), columns=list(levels))
    table = grid.loc[np.repeat(np.arange(len(grid)), seeds)].reset_index(drop=True)
    effect = (table[list(levels)] / table[list(levels)].max()).to_numpy() @ rng.normal(size=len(levels))
    columns = {f"measure_{place}": rng.normal() * effect + rng.normal(size=len(table)) for place in range(MEASURES)}
    gap = 0.1 + 0.02 * effect + 0.01 * columns["measure_0"] + 0.01 * rng.normal(size=len(table))
    loss = 0.01 * rng.random(len(table))
    return table.assign(seed=np.tile(np.arange(seeds), len(grid)), gen_gap=gap, train_loss=loss, **columns)


def timed(run: Callable[[], object]) -> float:
    """Return the CPU seconds of one call, all threads together: what other programs leave alone."""
    start = time.process_time()
    run()
    return time.process_time() - start


def scipy_bootstrap(x: Floats, y: Floats, counts: Floats) -> Floats:
    """Return tau of every resample, one call of scipy each."""
    every = np.arange(len(x))
    drawn = (np.repeat(every, count.astype(int)) for count in counts)
    return np.array([stats.kendalltau(x[rows], y[rows]).statistic for rows in drawn])


def loops_of_sign_error(
    table: pd.DataFrame, axes: list[str], names: list[str]
) -> dict[str, dict[tuple[int, int], float]]:
    """Accumulate weighted sign errors row by row, for all pairs that differ in one axis."""
    settings, gap = table[axes].to_numpy(), table["gen_gap"].to_numpy()
    config = configurations.of(table, axes, repeated=True).rows
    values = table[names].to_numpy()
    losses: dict[str, dict[tuple[int, int], float]] = {name: {} for name in names}
    weights: dict[tuple[int, int], float] = {}
    for i in range(len(table)):
        for j in range(len(table)):
            if (settings[i] != settings[j]).sum() != 1:
                continue
            pair = (int(config[i]), int(config[j]))
            weight = float(sign_error.hoeffding(np.array(gap[i] - gap[j]), TEST_EXAMPLES))
            weights[pair] = weights.get(pair, 0.0) + weight
            for place, name in enumerate(names):
                agree = np.sign(values[i, place] - values[j, place]) * np.sign(gap[i] - gap[j])
                losses[name][pair] = losses[name].get(pair, 0.0) + weight * (1 - agree) / 2
    return {
        name: {pair: loss / weights[pair] for pair, loss in of.items() if weights[pair]} for name, of in losses.items()
    }


def matrices_of_information(levels: Ints, x: Floats, y: Floats) -> float:
    """Return the smallest normalised conditional mutual information from matrices of all ordered pairs."""
    left, right = np.nonzero(~np.eye(len(x), dtype=bool))
    pairs = pd.DataFrame({"x": np.sign(x[left] - x[right]), "y": np.sign(y[left] - y[right])})
    smallest = 1.0
    for size in range(3):
        for part in itertools.combinations(range(levels.shape[1]), size):
            group = configurations.codes(levels[:, part])
            cells = pairs.assign(u=group[left] * (group.max() + 1) + group[right])
            n = cells.groupby(["u", "x", "y"]).size()
            of_u, of_x, of_y = (n.groupby(level=given).transform("sum") for given in ("u", ["u", "x"], ["u", "y"]))
            information, entropy = (n * np.log(n * of_u / (of_x * of_y))).sum(), -(n * np.log(of_y / of_u)).sum()
            smallest = min(smallest, information / entropy if entropy > 0 else 1.0)
    return smallest


def compare(table: pd.DataFrame, axes: list[str]) -> list[list[str]]:
    """Time ours and the direct way, statistic by statistic, for all measures; check that they agree."""
    names = [name for name in table.columns if name.startswith("measure_")]
    found = configurations.of(table, axes, repeated=True)
    gap = table["gen_gap"].to_numpy()
    y, x = found.means(gap), found.means(table["measure_0"].to_numpy())
    counts = bootstrap.draw(len(found), RESAMPLES, 0).counts

    few = counts[:PART_RESAMPLES]
    np.testing.assert_allclose(scipy_bootstrap(x, y, few), kendall.bootstrap_tau(x, y, few), atol=1e-12)
    tau = timed(lambda: kendall.bootstrap_tau(x, y, counts)) * MEASURES
    scipy = timed(lambda: scipy_bootstrap(x, y, few)) * MEASURES * RESAMPLES / PART_RESAMPLES

    means = [found.means(table[name].to_numpy()) for name in names]
    some = np.random.default_rng(0).choice(len(found), PART_CONFIGURATIONS, replace=False)
    levels, more = found.levels[some], (len(found) / PART_CONFIGURATIONS) ** 2
    expected = ours_of_information(axes, levels, [x[some]], y[some])
    assert np.isclose(matrices_of_information(levels, x[some], y[some]), expected[0], atol=1e-9)
    information = timed(lambda: ours_of_information(axes, found.levels, means, y))
    matrices = timed(lambda: matrices_of_information(levels, x[some], y[some])) * MEASURES * more

    part = table.iloc[:PART_ROWS]
    direct = loops_of_sign_error(part, axes, names)
    few_errors = sign_errors(part, axes, names)
    for name in names:
        assert np.isclose(few_errors[name], np.mean(list(direct[name].values())))
    loops = timed(lambda: loops_of_sign_error(part, axes, names)) * (len(table) / PART_ROWS) ** 2
    errors = timed(lambda: sign_errors(table, axes, names))
    rows = [("tau, 1,000 resamples", tau, scipy), ("CMI", information, matrices), ("sign error", errors, loops)]
    return [[name, f"{ours:.2f}", f"{other:.0f}", f"{other / ours:.0f}"] for name, ours, other in rows]


def ours_of_information(axes: list[str], levels: Ints, measures: list[Floats], y: Floats) -> list[float]:
    """Return our smallest conditional mutual information of every measure."""
    everything = conditional.conditional(axes, levels, measures, y)
    return [value for one in everything if (value := conditional.smallest(one)) is not None]


def sign_errors(table: pd.DataFrame, axes: list[str], names: list[str]) -> dict[str, float | None]:
    """Return our mean sign error of every measure over all environments with any weight."""
    found = configurations.of(table, axes, repeated=True)
    pairs = sign_error.environments(
        found, table["gen_gap"].to_numpy(), test_examples=TEST_EXAMPLES, least_effective=0.0
    )
    return {name: sign_error.sign_errors(pairs, table[name].to_numpy())[-1].mean for name in names}


def main() -> None:
    """Run the benchmark and print its tables."""
    for seeds in (5, 1):
        load = os.getloadavg()[0]
        table = models(seeds)
        axes = list(AXES)
        names = [name for name in table.columns if name.startswith("measure_")]
        request = {"axes": axes, "measures": names, "filter": "train_loss <= 0.01", "test_examples": TEST_EXAMPLES}
        start = time.perf_counter()
        seconds = timed(partial(correlate, table, **request))
        wall = time.perf_counter() - start
        size = f"{len(table)} models, {len(table) // seeds} configurations, {MEASURES} measures, {len(axes)} axes"
        title = f"Statistics, ours against direct implementations: {size}"
        shown = Table("statistic, all measures", "ours, CPU s", "direct, CPU s", "ratio", title=title)
        shown.add_row("everything", f"{seconds:.1f}")
        for row in compare(table, axes):
            shown.add_row(*row)
        about = f"everything took {wall:.1f} s by the clock; load {load:.1f}"
        show(shown, "analysis", ("numpy", "scipy", "pandas", "flatmin-sweep"), threads=None, about=about)


if __name__ == "__main__":
    main()
