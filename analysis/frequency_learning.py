"""When each frequency is learnt, and the spectral bias: the exponent s of epochs to learn frequency k ~ k^s.

A frequency is learnt at the first recorded epoch at which its coefficient is within a tolerance of the target's,
| |F| / |T| - 1 | <= tolerance. Not the first from which it stays there for good (`lasting`): with a constant step size
the noise of the batches moves a small coefficient in and out of any band for as long as training lasts, and that epoch
tells the noise and the length of training more than the learning. Both are at hand, and the report has both.

What is known is that this happened after the record before and by this one; of a frequency never learnt, that
it takes longer than the training. Both are bounds, not values: the line log epochs = a + s log k is fitted to them by
maximum likelihood with normal errors (an accelerated failure time model), so that frequencies never learnt count, and
rare records bias nothing. Its interval resamples models, whose frequencies come along.

After Rahaman et al. 2019, "On the spectral bias of neural networks", for the bias; Kalbfleisch and Prentice 2002, "The
statistical analysis of failure time data", for the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from flatmin.analysis import bootstrap, censored, frequency
from flatmin.errors import RequestError

TOLERANCE = 0.1
"""How far |F| / |T| may be from 1."""

RESAMPLES = 200
"""For a deviation, as the interval takes it, these are enough: it is known to 5 %."""


@dataclass(frozen=True)
class Bias:
    """The spectral bias of one line.

    Attributes:
        line: The optimizer.
        models: How many models.
        learnt: Their frequencies that were learnt, DC left out.
        count: All their frequencies, DC left out.
        slope: s: learning twice the frequency takes 2^s times as many epochs. None: see `reason`.
        low: Lower end of its 95 % interval; None for one model.
        high: The upper end.
        intercept: a, the log of the epochs that frequency 1 takes; None where the slope is.
        reason: Why there is no slope; else empty.
    """

    line: str
    models: int
    learnt: int
    count: int
    slope: float | None
    low: float | None
    high: float | None
    intercept: float | None
    reason: str = ""


def epochs_to_learn(ratio: pd.DataFrame, *, tolerance: float = TOLERANCE, lasting: bool = False) -> pd.DataFrame:
    """Find when each model learnt each frequency.

    Args:
        ratio: `frequency.Curves.ratio`. Epoch 0, before the training, is not looked at.
        tolerance: How far a coefficient may be from 1.
        lasting: Whether it has to stay within the tolerance at every record to the end.

    Returns:
        One row per model and frequency: `line`, `model_id`, `k`; `epoch`, the first record at which it is learnt,
        infinite where there is none; `after`, the record before (the last one, where it was not learnt), 0 where there
        is none; `end`, the last record.

    Raises:
        RequestError: The tolerance is not between 0 and 1.
    """
    if not 0 < tolerance < 1:
        raise RequestError(
            f"tolerance: {tolerance} is no distance of a coefficient from 1; give a number between 0 and 1, such as "
            f"{TOLERANCE}."
        )
    rows = ratio[ratio["epoch"] > 0]
    groups = rows.groupby(["line", "model_id", "k"], observed=True)
    place, epoch = groups.ngroup().to_numpy(), rows["epoch"].to_numpy()
    inside = ((rows["value"] - 1).abs() <= tolerance).to_numpy()

    def latest(chosen: np.ndarray) -> np.ndarray:
        out = np.zeros(groups.ngroups)
        np.maximum.at(out, place[chosen], epoch[chosen])
        return out

    if lasting:
        inside = epoch > latest(~inside)[place]
    first = np.full(groups.ngroups, np.inf)
    np.minimum.at(first, place[inside], epoch[inside])
    found = groups.size().index.to_frame(index=False).astype({"line": str, "model_id": str})
    return found.assign(epoch=first, after=latest(epoch < first[place]), end=latest(epoch > 0))


def biases(learnt: pd.DataFrame, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Bias]:
    """Fit the spectral bias of every line.

    Args:
        learnt: What `epochs_to_learn` returned.
        resamples: How many resamples of models give the interval.
        seed: Of the resamples.

    Returns:
        One per line, in order of their names.
    """
    rows = learnt[learnt["k"] > 0]
    return [_bias(str(line), part, resamples, seed) for line, part in rows.groupby("line")]


def _bias(line: str, rows: pd.DataFrame, resamples: int, seed: int) -> Bias:
    owner, ids = pd.factorize(rows["model_id"])
    draws = bootstrap.draw(len(ids), resamples, seed).counts
    weights = np.vstack([np.ones(len(rows)), draws[:, owner]])
    after, epoch = rows["after"].to_numpy(), rows["epoch"].to_numpy()
    low = np.log(after, out=np.full(len(rows), -np.inf), where=after > 0)
    fitted = censored.fit(np.log(rows["k"].to_numpy()), low, np.log(epoch), weights)
    known = int(np.isfinite(epoch).sum())
    slope = float(fitted.slope[0])
    if not math.isfinite(slope):
        reason = (
            "no frequency was learnt" if not known else "fewer than two frequencies were learnt after the first record"
        )
        return Bias(line, len(ids), known, len(rows), None, None, None, None, reason)
    below, above = frequency.interval(slope, fitted.slope[1:], len(ids))
    return Bias(line, len(ids), known, len(rows), slope, below, above, float(fitted.intercept[0]))


def medians(learnt: pd.DataFrame) -> pd.DataFrame:
    """Summarise the epochs to learn each frequency over models.

    Args:
        learnt: What `epochs_to_learn` returned.

    Returns:
        One row per line and frequency: `line`, `k`, `median` (infinite where half of the models or more never learnt
        it: it takes longer than the training), `n` models, and `never`, how many of them did not.
    """
    groups = learnt.assign(never=np.isinf(learnt["epoch"])).groupby(["line", "k"])
    out = groups.agg(median=("epoch", _median), n=("epoch", "size"), never=("never", "sum"))
    return out.reset_index()


def _median(epochs: pd.Series) -> float:
    """The median; of an even number the upper one, so that half of the models have learnt it by then."""
    return float(np.sort(epochs)[len(epochs) // 2])


def in_words(bias: Bias) -> str:
    """Say the spectral bias of one line in a clause.

    Args:
        bias: What `biases` returned.

    >>> in_words(Bias("sgd", 10, 38, 40, 1.91, 1.8, 2.02, 5.0))
    'sgd 1.91 [1.80, 2.02] (n = 10; 2 of 40 never learnt): low frequencies first'
    """
    never = bias.count - bias.learnt
    who = f"n = {bias.models}" + (f"; {never} of {bias.count} never learnt" if never else "")
    if bias.slope is None:
        return f"{bias.line}: no exponent (n = {bias.models}), for {bias.reason}"
    if bias.low is None or bias.high is None:
        return f"{bias.line} {bias.slope:.2f} ({who}), one model or too few to tell an interval"
    order = "low frequencies first" if bias.low > 0 else "no order that the models agree on"
    order = "high frequencies first" if bias.high < 0 else order
    return f"{bias.line} {bias.slope:.2f} [{bias.low:.2f}, {bias.high:.2f}] ({who}): {order}"
