"""The report's tables of frequencies: coefficients at a loss beside published ones, exponents of spectral bias."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pandas as pd

from flatmin.analysis import frames, frequency, frequency_learning, page
from flatmin.analysis.frequency import Curves
from flatmin.analysis.frequency_learning import Bias
from flatmin.analysis.sections_frequency import MOST_LABELS

TOLERANCES = (0.05, 0.1, 0.2)
"""The table of exponents has these, so that a reader sees how much hangs on the choice."""

_MOST_FREQUENCIES = 8
"""Frequencies in a table; of more, so many are shown, evenly spread."""


def tables(found: Sequence[Curves], epochs: pd.DataFrame, compared: pd.DataFrame) -> str:
    """Return the tables of coefficients at a loss, and of exponents, as HTML; empty where there is no spectrum.

    Args:
        found: What `frequency.read` returned.
        epochs: Rows of the `epochs/` table; may be empty.
        compared: What `published.compare` returned of `frequency.with_ratios`.
    """
    parts = []
    known = [one for one in found if not one.published and (one.ratio["k"] > 0).any()]
    for number, curves in enumerate(known[:MOST_LABELS]):
        said = "" if curves.label == frequency.KIND else f": {curves.label}"
        ratio = curves.ratio[curves.ratio["k"] > 0]
        # the published ones have been compared with the first spectrum
        parts.append(_at_loss(curves.ratio, epochs, compared if number == 0 else compared.iloc[:0], said))
        if ratio["k"].nunique() > 1:
            parts.append(_exponents(ratio, said))
    return "".join(parts)


def _at_loss(ratio: pd.DataFrame, epochs: pd.DataFrame, compared: pd.DataFrame, said: str) -> str:
    at = frequency.at_loss(ratio, epochs)
    printed = _printed(compared)
    rows = []
    for line, own in at.groupby("line"):
        first = own.drop_duplicates("model_id")
        there = first["epoch"].dropna()
        for k in _shown(ratio):
            known = own.loc[own["k"] == k, "value"].dropna()
            mean, sd = (None if frames.is_null(value) else f"{value:.3f}" for value in (known.mean(), known.std()))
            never = len(first) - len(there)
            rows.append((line, k, mean, sd, len(known), never, there.median(), printed.get((str(line), k))))
    header = ["optimizer", "k", "|F| / |T|", "sd", "n", "never there", "median epoch", "published"]
    note = (
        f"At each model's first recorded epoch with a training loss of at most {frequency.LOSS:g}; mean and sample "
        "deviation over models that got there. Our loss is of the weights after the epoch, the published one the mean "
        "of the batches during it."
    )
    heading = (
        f'<section class="frequencies"><h2>Fourier coefficients at a loss of {frequency.LOSS:g}{page.text(said)}</h2>'
    )
    return f'{heading}{page.table(header, rows, kind="numbers")}<p class="note">{page.text(note)}</p></section>'


def _printed(compared: pd.DataFrame) -> dict[tuple[str, float], str]:
    """The published coefficients by optimizer and frequency."""
    found = {}
    for row in compared.to_dict("records"):
        head, _, rest = str(row["quantity"]).partition("(")
        optimizer = json.loads(row["settings"]).get("optimizer")
        if head == "fourier_ratio" and optimizer is not None:
            found[str(optimizer), float(rest.rstrip(")"))] = str(row["printed"])
    return found


def _shown(points: pd.DataFrame) -> list[float]:
    return frames.spread(sorted(points["k"].unique()), _MOST_FREQUENCIES)


def _exponents(ratio: pd.DataFrame, said: str) -> str:
    ks = _shown(ratio)
    rows = []
    for tolerance in TOLERANCES:
        reached = frequency_learning.epochs_to_learn(ratio, tolerance=tolerance)
        lasting = frequency_learning.epochs_to_learn(ratio, tolerance=tolerance, lasting=True)
        half = frequency_learning.medians(reached).set_index(["line", "k"])["median"]
        fits = zip(frequency_learning.biases(reached), frequency_learning.biases(lasting), strict=True)
        for one, other in fits:
            medians = [_epoch(half[one.line, k]) for k in ks]
            rows.append((one.line, tolerance, *_exponent(one), *medians, *_exponent(other)))
    header = ["optimizer", "tolerance", "exponent", "95 % interval", "never"]
    header += [f"k = {k:g}" for k in ks] + ["for good: exponent", "95 % interval", "never"]
    note = (
        "The exponent s of epochs to learn frequency k ~ k^s, and the median epoch at which each k is learnt: the "
        "first record with |F| / |T| within the tolerance of 1 (never: for half of the models or more there is none). "
        "For good: the first from which it stays there to the end, which the noise of the batches delays. The columns "
        "'never' count models and frequencies; a dash: fewer than two frequencies were learnt after the first record, "
        "or there is one model."
    )
    heading = f'<section class="frequencies"><h2>Epochs to learn a frequency{page.text(said)}</h2>'
    rows.sort(key=lambda row: (row[0], row[1]))
    return f'{heading}{page.table(header, rows, kind="numbers")}<p class="note">{page.text(note)}</p></section>'


def _epoch(value: float) -> str:
    return "never" if value == float("inf") else f"{value:g}"


def _exponent(bias: Bias) -> tuple[str | None, str | None, str]:
    slope = None if bias.slope is None else f"{bias.slope:.2f}"
    known = bias.low is not None and bias.high is not None
    interval = f"[{bias.low:.2f}, {bias.high:.2f}]" if known else None
    return slope, interval, f"{bias.count - bias.learnt} of {bias.count}"
