"""The report's figures in reading order: those that fit the data, and a reason for each left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from flatmin.analysis import frames, sections_curves, sections_frequency, sections_measures, sections_models
from flatmin.analysis.choices import View
from flatmin.analysis.figures import noise
from flatmin.analysis.frequency import Curves
from flatmin.analysis.section import Left, Missing, Section, Variant

PUBLISHED = "Beside the published numbers"
"""The heading of the figure, and of its table."""


def figures(
    views: Sequence[View],
    epochs: pd.DataFrame,
    sharpness: pd.DataFrame,
    *,
    target: str,
    spectra: pd.DataFrame | None = None,
    waves: Sequence[Curves] = (),
    compared: pd.DataFrame | None = None,
    plan: pd.DataFrame | None = None,
    failures: pd.DataFrame | None = None,
) -> tuple[list[Section], list[Left]]:
    """Make every figure that fits, for every choice of the reader.

    Args:
        views: The tables of every choice, the default first.
        epochs: Rows of the `epochs/` table; may be empty.
        sharpness: Rows of the `sharpness/` table; may be empty.
        target: The column that measures are compared with.
        spectra: Rows of the `spectra/` table; None or empty leave its figures out without a word.
        waves: What `frequency.read` returned of it; empty leaves the figures of frequencies out without a word.
        compared: What `published.compare` returned; None or empty leave its figure out without a word.
        plan: Rows of the `plan/` table; None when unknown.
        failures: Rows of the `failures/` table; None when unknown.

    Returns:
        The figures, and those left out with the reason.
    """
    # what does not depend on how seeds are handled is made once per filter
    once = [view for view in views if view.seeds == "means"]
    models = views[0].models
    made: list[Section | Left] = [
        _section(
            "against-axis",
            "Errors and measures against a setting",
            (one for view in once for one in sections_models.against(view, sharpness)),
        ),
        _section(
            "scatter",
            f"Measures against {target}",
            (one for view in views for one in sections_measures.against_gap(view, sharpness, target)),
        ),
        _section(
            "correlations",
            f"Rank correlation with {target}",
            (one for view in views for one in sections_measures.ranking(view)),
        ),
        _section(
            "psi",
            "Within groups that differ in one setting",
            (one for view in views for one in sections_measures.granulated(view)),
        ),
        *_noise(once, sharpness, target),
    ]
    if spectra is not None and len(spectra):
        made += sections_curves.sections(spectra, models, target)
    made += sections_frequency.sections(waves, models, epochs)
    made += [
        _section(
            "training",
            "Training curves",
            (one for view in once for one in sections_models.training_curves(view, epochs)),
        ),
        _section(
            "under-way",
            "Measures during the training",
            (one for view in once for one in sections_measures.under_way(view, sharpness)),
        ),
        _section(
            "optimizers",
            "Optimizers compared",
            (one for view in once for one in sections_models.optimizer_comparison(view, compared)),
        ),
    ]
    made.append(
        _section(
            "optimizers-along",
            "Optimizers along a setting",
            (one for view in once for one in sections_models.optimizers_along_settings(view)),
        )
    )
    if compared is not None and len(compared):
        made.append(_section("published", PUBLISHED, sections_models.beside_published(compared)))
    made += [
        _section("cost", "Cost of the measures", sections_measures.costs(sharpness)),
        _section(
            "coverage",
            "Coverage of the grid",
            (one for view in once for one in sections_models.grid(view, plan, failures)),
        ),
    ]
    return [one for one in made if isinstance(one, Section)], [one for one in made if isinstance(one, Left)]


def _section(name: str, heading: str, made: Iterator[Variant | Missing]) -> Section | Left:
    variants = tuple(made)
    if any(isinstance(one, Variant) for one in variants):
        return Section(name, heading, variants)
    return Left(heading, next(one.reason for one in variants if isinstance(one, Missing)))


def _noise(views: Sequence[View], sharpness: pd.DataFrame, target: str) -> Iterator[Section | Left]:
    """A section for every level of noise that varies."""
    models = views[0].models
    for axis in (axis for axis in frames.varying(models) if axis in noise.LEVELS):
        made = (one for view in views for one in sections_measures.noise_sweep(view, sharpness, target, axis))
        yield _section(f"noise-{axis}", f"Noise sweep: {axis}", made)
