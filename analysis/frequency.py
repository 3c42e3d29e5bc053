"""Fourier coefficients while training, the rows of `spectra/` of kind `fourier`: reading them, means over seeds.

F(k) is the Fourier coefficient of what a network puts out, T(k) that of the truth, k the frequency in cycles over the
range of the inputs. Read are the parts `ratio`, |F| / |T|, which is 1 when a frequency is learnt, and `error`, Delta F,
|F - T| / |T|, which is 0 then; both are pure numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from flatmin.analysis import curves, frames
from flatmin.analysis.configurations import Floats

KIND = "fourier"

LOSS = 0.2
"""The published table of coefficients is at the first recorded epoch with a training loss of at most this."""

ALL = "all models"
"""The one line of a study that has no column `optimizer`."""

UNKNOWN = "no optimizer given"
"""The line of models whose `optimizer` is null."""


@dataclass(frozen=True)
class Curves:
    """The curves of one label, of the models whose training came to an end.

    Attributes:
        label: The measure with its arguments.
        ratio: A row per model, epoch and frequency: `line` (the optimizer), `model_id`, `epoch`, `k`, `value`.
        error: The same of Delta F.
        published: Whether `k` is the index of the published axis, which is reversed and not scaled to the inputs.
    """

    label: str
    ratio: pd.DataFrame
    error: pd.DataFrame
    published: bool = False


def read(spectra: pd.DataFrame, models: pd.DataFrame) -> list[Curves]:
    """Read the curves of every label.

    Args:
        spectra: Rows of the `spectra/` table, of any kind; millions are no problem.
        models: Rows of the `models/` table; only those whose training came to an end are used.

    Returns:
        The labels in order, those included of which no model that counts has a curve; empty without a spectrum.

    Raises:
        RequestError: A column is missing, or not numeric.
    """
    frames.check_columns(spectra, ["model_id", "epoch", "kind", "settings", "x", "value"], role="spectra table")
    frames.check_columns(models, ["model_id"], role="models table")
    owners = models[frames.kept(models)].drop_duplicates("model_id").reset_index(drop=True)
    rows = spectra[spectra["kind"] == KIND].reset_index(drop=True)
    place = pd.Index(owners["model_id"]).get_indexer(pd.Index(rows["model_id"]))
    lines = _lines_of(owners)
    names = sorted(lines.unique())
    table = pd.DataFrame(
        {
            # categories: text would be compared letter by letter, millions of times
            "line": pd.Categorical.from_codes(np.array([*map(names.index, lines), -1])[place], pd.Index(names)),
            "model_id": pd.Categorical.from_codes(place, pd.Index(owners["model_id"])),
            "epoch": frames.numeric(rows, "epoch", role="spectra table"),
            "k": frames.numeric(rows, "x", role="spectra table"),
            "value": frames.numeric(rows, "value", role="spectra table"),
        }
    )
    codes, texts = pd.factorize(rows["settings"].fillna(""))
    return list(_labelled(table, codes, texts))


def _lines_of(models: pd.DataFrame) -> pd.Series[str]:
    """The line that each model belongs to."""
    if "optimizer" not in models.columns:
        return pd.Series(ALL, index=models.index)
    return models["optimizer"].astype(object).fillna(UNKNOWN).astype(str)


def _labelled(table: pd.DataFrame, codes: np.ndarray, texts: pd.Index) -> Iterator[Curves]:
    held = [curves.settings_of(text) for text in texts]
    for label in sorted({str(found.get("label", KIND)) for found in held}):
        parts = {}
        for part in ("ratio", "error"):
            own = [one.get("part") == part and one.get("label", KIND) == label for one in held]
            chosen = table[np.array(own)[codes]]
            parts[part] = chosen.dropna(subset=["model_id", "epoch", "k"]).reset_index(drop=True)
        theirs = any(one.get("published") is True for one in held if one.get("label", KIND) == label)
        yield Curves(label, parts["ratio"], parts["error"], theirs)


def over_models(points: pd.DataFrame, *, most_epochs: int, most_frequencies: int | None = None) -> pd.DataFrame:
    """Average curves over the models of each line, at some of their epochs.

    Args:
        points: `Curves.ratio` or `Curves.error`.
        most_epochs: Epochs to keep of each line; see `frames.thin`.
        most_frequencies: Frequencies to keep, evenly spread; None: all.

    Returns:
        One row per line, frequency and epoch: `line`, `k`, `epoch`, `mean`, `sd` (sample deviation, null for one model)
        and `n`, the models with a value.
    """
    ks = sorted(points["k"].unique())
    shown = ks if most_frequencies is None else frames.spread(ks, most_frequencies)
    rows = points[points["k"].isin(shown)]
    lines = rows.groupby("line", observed=True)["epoch"]
    epochs = [own.isin(frames.thin(own, most_epochs)) for _, own in lines]
    rows = rows[pd.concat(epochs).reindex(rows.index)] if epochs else rows
    groups = rows.groupby(["line", "k", "epoch"], observed=True)["value"]
    out = groups.agg(["mean", "std", "count"]).reset_index()
    return out.rename(columns={"std": "sd", "count": "n"}).astype({"line": str})


def losses(epochs: pd.DataFrame, models: pd.DataFrame, *, most_epochs: int) -> pd.DataFrame:
    """Average log10 of the training loss over the models of each optimizer.

    Args:
        epochs: Rows of the `epochs/` table.
        models: Rows of the `models/` table; only those whose training came to an end are used.
        most_epochs: Epochs to keep of each line; see `frames.thin`.

    Returns:
        One row per line and epoch: `line`, `epoch`, `mean` of log10, `sd` (sample deviation) and `n`.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    frames.check_columns(epochs, ["model_id", "epoch", "train_loss"], role="epochs table")
    table = models[frames.kept(models)].drop_duplicates("model_id").set_index("model_id")
    loss = frames.numeric(epochs, "train_loss", role="epochs table")
    rows = pd.DataFrame(
        {
            "line": epochs["model_id"].map(_lines_of(table)),
            "epoch": epochs["epoch"],
            "k": 0.0,
            "value": np.log10(loss, out=np.full(len(loss), np.nan), where=loss > 0),
        }
    )
    return over_models(rows.dropna(), most_epochs=most_epochs).drop(columns="k")


def at_loss(ratio: pd.DataFrame, epochs: pd.DataFrame, *, loss: float = LOSS) -> pd.DataFrame:
    """Return the coefficients of every model at its first recorded epoch with a training loss of at most `loss`.

    Args:
        ratio: `Curves.ratio`.
        epochs: Rows of the `epochs/` table, with the training loss of the same epochs.
        loss: In the unit of the training loss.

    Returns:
        One row per model and frequency: `line`, `model_id`, `k`, `epoch` and `value`; the last two are null for a model
        that never got there.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    every = ratio[["line", "model_id", "k"]].drop_duplicates().astype({"line": str, "model_id": str})
    recorded = ratio[["model_id", "epoch"]].drop_duplicates().astype({"model_id": str})
    if epochs.empty:
        return every.assign(epoch=math.nan, value=math.nan).reset_index(drop=True)
    frames.check_columns(epochs, ["model_id", "epoch", "train_loss"], role="epochs table")
    low = epochs[frames.numeric(epochs, "train_loss", role="epochs table") <= loss]
    there = recorded.merge(low[["model_id", "epoch"]].astype({"model_id": str, "epoch": float}))
    first = there.groupby("model_id")["epoch"].min()
    found = ratio[ratio["epoch"] == ratio["model_id"].map(first).astype(float)].astype({"line": str, "model_id": str})
    return every.merge(found, on=["line", "model_id", "k"], how="left")


def with_ratios(
    sharpness: pd.DataFrame, found: Sequence[Curves], models: pd.DataFrame, epochs: pd.DataFrame
) -> pd.DataFrame:
    """Add the coefficients at a loss of 0.2 to measures, as `fourier_ratio(k)`: the name of the published ones.

    Args:
        sharpness: Rows of the `sharpness/` table; may be empty.
        found: What `read` returned.
        models: Rows of the `models/` table.
        epochs: Rows of the `epochs/` table; may be empty.

    Returns:
        `sharpness` and a row per model and frequency of the first spectrum, dated to the end of training; `sharpness`
        itself where there is no spectrum, or only those with the published axis.
    """
    plain = [one for one in found if not one.published and len(one.ratio)]
    if not plain:
        return sharpness
    keys = [key for key in ("model_id", "trial_id", "epochs_run") if key in models.columns]
    at = at_loss(plain[0].ratio, epochs).drop(columns="epoch").merge(models[keys], on="model_id")
    at["label"] = at["k"].map("fourier_ratio({:g})".format)
    rows = at.rename(columns={"epochs_run": "epoch"}).drop(columns=["line", "k"])
    return pd.concat([sharpness, rows], ignore_index=True) if len(sharpness) else rows


def interval(value: float, drawn: Floats, n: int) -> tuple[float, float] | tuple[None, None]:
    """Return a 95 % interval from resamples of few models: value ± t(0.975, n - 1) √(n / (n - 1)) sd(drawn).

    For a mean it is Student's interval; percentiles of so few would be too narrow (Hesterberg 2015, "What teachers
    should know about the bootstrap", section 4.1.2).

    Args:
        value: The statistic.
        drawn: The statistic of every resample of models; NaN where it is undefined.
        n: The number of models.

    Returns:
        Lower and upper end; None for one model, or where less than half of the resamples have a value.
    """
    known = drawn[np.isfinite(drawn)]
    if n < 2 or not math.isfinite(value) or 2 * len(known) < max(2, len(drawn)):
        return None, None
    half = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(n / (n - 1)) * float(known.std())
    return value - half, value + half
