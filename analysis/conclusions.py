"""What a study's correlations say, in sentences that are built from the numbers."""

from __future__ import annotations

from collections.abc import Mapping

from flatmin.analysis.association import MeasureCorrelation
from flatmin.analysis.correlation import TRAINING_LOSS, Correlations
from flatmin.analysis.figures.theme import format_tau

MOST_NAMES = 4
"""Measures that a sentence names; further ones are counted."""


def conclusions(result: Correlations, *, rows: bool = False) -> list[str]:
    """Say which measure ranks highest, how it stands beside the controls, and whose sign the settings make.

    Args:
        result: The correlations of one target.
        rows: Whether every model counts for itself, so that there are no intervals.

    Returns:
        Sentences, the most important first; empty where no tau is defined.
    """
    known = {name: one for name, one in result.measures.items() if one.tau is not None}
    if not known:
        return []
    said = [_highest(result, known, rows), _certain(known), _flips(result, known), *_controls(result, known)]
    return [sentence for sentence in said if sentence]


def _tau(one: MeasureCorrelation) -> float:
    return one.tau if one.tau is not None else 0.0


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    interval = "" if low is None or high is None else f" [{format_tau(low)}, {format_tau(high)}]"
    return f"{format_tau(value)}{interval}"


def _highest(result: Correlations, known: Mapping[str, MeasureCorrelation], rows: bool) -> str:
    name, best = max(known.items(), key=lambda item: _tau(item[1]))
    count = f"n = {best.n}" + ("" if rows else f", {best.n_configs} configurations")
    tau = _with_interval(best.tau, best.tau_low, best.tau_high)
    said = f"{name} ranks highest with {result.target}: tau {tau}, {count}"
    if best.partial is not None:
        said += f"; given {_listed(result.axes)}, {_with_interval(best.partial, best.partial_low, best.partial_high)}"
    other, worst = min(known.items(), key=lambda item: _tau(item[1]))
    if _tau(worst) < -abs(_tau(best)):
        opposite = _with_interval(worst.tau, worst.tau_low, worst.tau_high)
        said += f". Further from zero, but against it, is {other}: tau {opposite}, n = {worst.n}"
    return f"{said}."


def _certain(known: Mapping[str, MeasureCorrelation]) -> str:
    intervals = [(one.tau_low, one.tau_high) for one in known.values()]
    bounds = [(low, high) for low, high in intervals if low is not None and high is not None]
    if not bounds:
        return ""
    clear = sum(low > 0 or high < 0 for low, high in bounds)
    return f"Intervals of {clear} of {len(bounds)} measures are clear of zero."


def _flips(result: Correlations, known: Mapping[str, MeasureCorrelation]) -> str:
    given = {name: one for name, one in known.items() if one.sign_flip is not None}
    flipped = sorted((name for name in given if given[name].sign_flip), key=lambda name: -abs(_tau(given[name])))
    if not given:
        return ""
    if not flipped:
        return f"No measure changes sign given {_listed(result.axes)}."
    verb = "changes" if len(flipped) == 1 else "change"
    return f"{_listed(flipped)} {verb} sign given {_listed(result.axes)}: the settings order the {result.target} there."


def _controls(result: Correlations, known: Mapping[str, MeasureCorrelation]) -> list[str]:
    said = []
    for name, one in result.controls.items():
        if one.tau is None:
            continue
        above = sum(abs(_tau(other)) > abs(one.tau) for other in known.values())
        what = "The training loss" if name == TRAINING_LOSS else "A random measure"
        said.append(
            f"{what} has tau {_with_interval(one.tau, one.tau_low, one.tau_high)}: "
            f"{above} of {len(known)} measures are further from zero."
        )
    return said


def _listed(names: tuple[str, ...] | list[str]) -> str:
    """Name a few, count the rest.

    >>> _listed(["lr"]), _listed(["lr", "width"]), _listed(["a", "b", "c", "d", "e", "f"])
    ('lr', 'lr and width', 'a, b, c, d and 2 more')
    """
    shown = list(names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        return f"{', '.join(shown)} and {len(names) - MOST_NAMES} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)
