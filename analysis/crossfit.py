r"""Leave-one-axis-out prediction: does a measure predict the target at values of an axis that it has not seen?

For every axis each of its levels is left out in turn. On the other configurations the target is regressed on the rank
of the measure, a number in [0, 1] that depends on no unit; the line then predicts the level left out.

.. math:: R^2 = 1 - \frac{\sum (y - \hat y)^2}{\sum (y - \bar y_\text{fit})^2}

sums over all configurations, each predicted when it was left out, against the mean of the configurations fitted. 1 is
exact, 0 no better than that mean, negative worse. Cross-validation after Stone 1974; leaving out whole environments
follows Dziugaite et al. 2020.
"""

from __future__ import annotations

import numpy as np

from flatmin.analysis.configurations import Configurations, Floats, Ints

MOST_FOLDS = 20
"""An axis with more levels is left out in as many parts, neighbours apart."""

_FEWEST = 3  # configurations to fit a line to


def crossfit(configurations: Configurations, x: Floats, y: Floats) -> dict[str, float | None]:
    """Return the cross-fitted R^2 of the target for every axis.

    Args:
        configurations: What differs in which axis.
        x: The measure of every configuration.
        y: The target of every configuration.

    Returns:
        One entry per axis, over the configurations that have it; None where it has one level, too few configurations
        are left to fit, or the target does not vary.
    """
    found = {}
    for place, axis in enumerate(configurations.axes):
        having = configurations.having(place)
        found[axis] = _axis(configurations.levels[having, place] % MOST_FOLDS, x[having], y[having])
    return found


def _axis(folds: Ints, x: Floats, y: Floats) -> float | None:
    missed = spread = 0.0
    for fold in np.unique(folds):
        out = folds == fold
        fit_x, fit_y = x[~out], y[~out]
        if len(fit_x) < _FEWEST:
            return None
        ranked = np.sort(fit_x)
        rank, new = _rank(fit_x, ranked), _rank(x[out], ranked)
        variance = float(np.var(rank))
        slope = float(np.mean((rank - rank.mean()) * (fit_y - fit_y.mean()))) / variance if variance > 0 else 0.0
        missed += float(((y[out] - fit_y.mean() - slope * (new - rank.mean())) ** 2).sum())
        spread += float(((y[out] - fit_y.mean()) ** 2).sum())
    return 1 - missed / spread if spread > 0 else None


def _rank(values: Floats, ranked: Floats) -> Floats:
    """The share of fitted values below, ties half."""
    below, up_to = np.searchsorted(ranked, values, "left"), np.searchsorted(ranked, values, "right")
    return np.asarray((below + up_to) / (2 * len(ranked)))
