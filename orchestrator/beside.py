"""A study's models beside the published numbers: what the report and the view `published` share."""

from __future__ import annotations

import pandas as pd

from flatmin.analysis import frequency, frequency_accuracy
from flatmin.analysis.published import compare, published
from flatmin.orchestrator.study import builtin_names, read_study
from flatmin.results import Results


def as_published(study: str) -> pd.DataFrame | None:
    """Return the settings of a built-in study's models, a row each; None where there is no study of that name."""
    if study not in builtin_names():
        return None
    return pd.DataFrame([dict(model.settings) for model in read_study(study).models])


def published_beside(results: Results) -> pd.DataFrame:
    """Return all published numbers, with ours beside those of the study that the results are of.

    The columns are those of `flatmin.analysis.published.compare`.
    """
    models = results.models()
    name = str(models["study"].iloc[0]) if len(models) else ""
    epochs, waves = results.epochs(), frequency.read(results.spectra(), models)
    measured = frequency.with_ratios(results.sharpness(), waves, models, epochs)
    of_all = frequency_accuracy.as_published(waves, epochs)
    compared = compare(models, measured, epochs, recipes=as_published(name), of_all=of_all)
    numbers = published()
    others = numbers[~numbers["study"].isin(compared["study"])]
    others = others.assign(missing="no model of this study is there, stand-ins left out")
    return pd.concat([compared, others], ignore_index=True)
