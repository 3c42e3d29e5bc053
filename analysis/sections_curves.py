"""The report's figures of curves: loss surfaces and Hessian spectral densities, one per label."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from flatmin.analysis import curves, frames, panels
from flatmin.analysis.figures import density, surface
from flatmin.analysis.section import Left, Section, Variant, counted, main_axis, pooled, some_of

MOST_LABELS = 4
"""Measures of one kind of curve that are drawn; the others are named."""


def sections(spectra: pd.DataFrame, models: pd.DataFrame, target: str) -> Iterator[Section | Left]:
    """Yield a section for every label of every kind of curve, or why there is none.

    Args:
        spectra: Rows of the `spectra/` table.
        models: Rows of the `models/` table.
        target: The column that tells which models stand for all.
    """
    kinds = ((surface.KIND, "Loss surface", _surface), (density.KIND, "Hessian spectral density", _density))
    for kind, words, make in kinds:
        rows = curves.of_kind(spectra, kind)
        for number, label in enumerate(sorted(rows["label"].unique()), start=1):
            name, heading = f"{kind.replace('_', '-')}-{number}", f"{words}: {label}"
            if number > MOST_LABELS:
                yield Left(heading, f"only the first {MOST_LABELS} measures of this kind are drawn.")
                continue
            made = make(label, rows[rows["label"] == label], models, target)
            yield Left(heading, made) if isinstance(made, str) else Section(name, heading, (made,))


def _surface(label: str, rows: pd.DataFrame, models: pd.DataFrame, target: str) -> Variant | str:
    data = surface.data(rows, models, label=label, target=target)
    if data["value"].isna().all():
        return "no model that counts has a finite one."
    point, whats, look = (
        ("w + x d", "d is", "Look for how wide the valley is, and whether its walls differ between the models.")
        if data["y"].isna().all()
        else ("w + x d1 + y d2", "d1 and d2 are", "White crosses: w. Look for how far the low region reaches.")
    )
    caption = (
        f"{_representing(rows, models, data['model_id'].nunique(), target)} The loss of the training set (unless the "
        f"label says another) at {point} around the trained weights w; what {whats}, the label says (random and "
        f"filter-normalised by default). {look} A slice shows one or two of very many directions."
    )
    return Variant(caption, panels.drawn(surface.draw(data)), data)


def _density(label: str, rows: pd.DataFrame, models: pd.DataFrame, target: str) -> Variant | str:
    axis = main_axis(models)
    data = density.data(rows, models, label=label, axis=axis, target=target)
    if not (data["density"] > 0).any():
        return "no model that counts has one."
    having = models["model_id"].isin(rows["model_id"].unique())
    whose = (
        f"{counted(models[having])} Lines: mean {pooled(models, (axis,))}.{some_of(models, axis, density.MOST_LINES)}"
        if axis
        else _representing(rows, models, data["line"].nunique(), target)
    )
    caption = (
        f"{whose} Density of the Hessian's eigenvalues, smoothed, on a logarithmic axis. Look for the bulk at zero, "
        "for eigenvalues that stand apart from it on the right, and for negative ones."
    )
    return Variant(caption, panels.drawn(density.draw(data)), data)


def _representing(rows: pd.DataFrame, models: pd.DataFrame, drawn: int, target: str) -> str:
    """Say which models a figure of curves shows, and of how many."""
    count = int((frames.kept(models) & models["model_id"].isin(rows["model_id"].unique())).sum())
    if count <= drawn:
        return f"All models that have it: n = {count}."
    return f"Of n = {count} models that have it, those with the lowest, the median and the highest {target}."
