"""A straight line through values of which only bounds are known: interval-censored regression, many weightings at once.

y = a + b x + s e with normal e; of y a lower and an upper bound is known, of which one may be infinite (Tobin 1958). In
t = 1 / s and g = (a, b) / s the log-likelihood, the sum of w log(Φ(t high - g x) - Φ(t low - g x)), is concave, so that
Newton's method with halved steps finds its maximum (Burridge 1981, "A note on maximum likelihood estimation for
regression models using grouped data").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr

from flatmin.analysis.configurations import Floats

SMALLEST = 0.01
"""Spreads s far below this cannot be told from none: -(SMALLEST t)² / 2 keeps t finite where a line fits all bounds."""

_STEPS = 100
_HALVINGS = 40
_CLOSE = 1e-12


@dataclass(frozen=True)
class Lines:
    """One line per weighting; NaN where there is none.

    Attributes:
        intercept: a, shape `(weightings,)`.
        slope: b, the same shape.
        spread: s, the same shape.
    """

    intercept: Floats
    slope: Floats
    spread: Floats


@dataclass(frozen=True)
class _Bounds:
    """The design at both bounds, `(rows, 3)` in the order (g, t), 0 where a bound is infinite; and which are."""

    low: Floats
    high: Floats
    without_low: np.ndarray
    without_high: np.ndarray


def fit(x: Floats, low: Floats, high: Floats, weights: Floats) -> Lines:
    """Fit a line by maximum likelihood under every row of weights.

    Args:
        x: Shape `(rows,)`.
        low: Lower bounds of y, `-inf` where there is none, shape `(rows,)`.
        high: Upper bounds of y, above the lower ones; `inf` where there is none.
        weights: How often each row counts, shape `(weightings, rows)`.

    Returns:
        The lines. Under weights that leave fewer than two values of x with two finite bounds there is none: any slope
        that is steep enough would do.
    """
    finite = np.isfinite(low) & np.isfinite(high)
    defined = _levels(np.where(finite, weights, 0), x) >= 2
    out = np.full((3, len(weights)), np.nan)
    if defined.any():
        middle = float(x.mean())
        shift = float(((low + high) / 2)[finite].mean())
        g0, g1, t = _maximum(x - middle, low - shift, high - shift, weights[defined].astype(np.float64)).T
        slope = g1 / t
        out[:, defined] = g0 / t - slope * middle + shift, slope, 1 / t
    return Lines(*out)


def _levels(weights: Floats, x: Floats) -> np.ndarray:
    """How many values of x have weight, per weighting."""
    return np.asarray(np.sum([(weights[:, x == value] > 0).any(axis=1) for value in np.unique(x)], axis=0))


def _maximum(x: Floats, low: Floats, high: Floats, weights: Floats) -> Floats:
    at_low, at_high = (
        np.column_stack([-np.ones_like(x), -x, np.where(np.isfinite(end), end, 0.0)]) for end in (low, high)
    )
    bounds = _Bounds(at_low, at_high, np.isinf(low), np.isinf(high))
    point = np.tile([0.0, 0.0, 1.0], (len(weights), 1))
    value = _value(point, bounds, weights)
    for _ in range(_STEPS):
        gradient, curvature = _derivatives(point, bounds, weights)
        step = np.linalg.solve(-curvature, gradient[..., None])[..., 0]
        gain = (gradient * step).sum(axis=1)
        if (gain < _CLOSE * (1 + np.abs(value))).all():
            break
        size = np.ones(len(weights))
        for _ in range(_HALVINGS):
            new = _value(point + size[:, None] * step, bounds, weights)
            short = ~(new >= value + 1e-4 * size * gain) & (gain > _CLOSE)
            if not short.any():
                break
            size[short] /= 2
        better = new > value
        point = np.where(better[:, None], point + size[:, None] * step, point)
        value = np.where(better, new, value)
    return point


def _standardised(point: Floats, bounds: _Bounds) -> tuple[Floats, Floats]:
    """Both bounds in units of s, from the line; shape `(weightings, rows)`, infinite where a bound is."""
    return (
        np.where(bounds.without_low, -np.inf, point @ bounds.low.T),
        np.where(bounds.without_high, np.inf, point @ bounds.high.T),
    )


def _log_mass(low: Floats, high: Floats) -> Floats:
    """log(Φ(high) - Φ(low)), taken in the lower tail, where it is exact; -inf where high is not above low."""
    upper = low + np.where(np.isinf(high), 0, high) > 0
    upper |= np.isinf(high) & np.isfinite(low)
    below, above = np.where(upper, -high, low), np.where(upper, -low, high)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = log_ndtr(below) - log_ndtr(above)
        mass = log_ndtr(above) + np.log(-np.expm1(gap))
    return np.where(high > low, mass, -np.inf)


def _value(point: Floats, bounds: _Bounds, weights: Floats) -> Floats:
    mass = _log_mass(*_standardised(point, bounds))
    # a row without weight must not make 0 * -inf
    total = np.where(weights > 0, weights * np.where(weights > 0, mass, 0), 0).sum(axis=1)
    return np.asarray(total - (SMALLEST * point[:, 2]) ** 2 / 2)


def _derivatives(point: Floats, bounds: _Bounds, weights: Floats) -> tuple[Floats, Floats]:
    """Gradient `(weightings, 3)` and second derivatives `(weightings, 3, 3)` of `_value`."""
    low, high = _standardised(point, bounds)
    mass = _log_mass(low, high)
    # φ(end) / (Φ(high) - Φ(low)), 0 at an infinite end
    at_low, at_high = (np.exp(-end * end / 2 - mass) / np.sqrt(2 * np.pi) for end in (low, high))
    low, high = np.where(bounds.without_low, 0, low), np.where(bounds.without_high, 0, high)
    gradient = (weights * at_high) @ bounds.high - (weights * at_low) @ bounds.low

    def product(factor: Floats, left: Floats, right: Floats) -> Floats:
        return np.asarray(np.einsum("bn,ni,nj->bij", weights * factor, left, right, optimize=True))

    mixed = product(at_low * at_high, bounds.low, bounds.high)
    curvature = product(at_low * (low - at_low), bounds.low, bounds.low) + mixed + mixed.swapaxes(1, 2)
    curvature -= product(at_high * (high + at_high), bounds.high, bounds.high)
    gradient[:, 2] -= SMALLEST**2 * point[:, 2]
    curvature[:, 2, 2] -= SMALLEST**2
    return gradient, curvature
