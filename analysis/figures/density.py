"""The spectral density of the Hessian on a logarithmic axis: a line per model, or per value of a setting.

Ghorbani, Krishnan and Xiao 2019, "An investigation into neural net optimization via Hessian eigenvalue density".
"""

from __future__ import annotations

import html
from collections.abc import Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from flatmin.analysis import curves, frames
from flatmin.analysis.figures import theme

KIND = "hessian_density"
MOST_LINES = 6
MOST_POINTS = 1000

_DECADES = 8
"""Powers of ten below the peak that are drawn; under it a smoothed density is the tail of its kernel."""

_COLUMNS = ["label", "line", "x", "density", "n"]


def data(
    spectra: pd.DataFrame, models: pd.DataFrame, *, label: str, axis: str | None = None, target: str = "gen_gap"
) -> pd.DataFrame:
    """List the densities of one label, of a few models, or averaged over the models of each value of a setting.

    Densities that are averaged are interpolated linearly between their points, and are 0 outside. Curves of errors
    (`part=stderr`) are left out.

    Args:
        spectra: Rows of the `spectra/` table.
        models: Rows of the `models/` table; only those whose training came to an end are used.
        label: The measure label whose densities to take.
        axis: The setting that makes the lines, of at most `MOST_LINES` evenly spread values. None: a line for each of
            the few models that stand for all; see `flatmin.analysis.curves`.
        target: The column by which these few are chosen.

    Returns:
        One row per point: `label`, `line` (its name), `x` (the eigenvalue), `density` and `n`, the models averaged;
        sorted by line and x.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    frames.check_columns(models, ["model_id", *([axis] if axis else [])], role="figure")
    rows = curves.of_kind(spectra, KIND)
    rows = rows[(rows["label"] == label) & (rows["part"].isna() | (rows["part"] == "density"))].reset_index(drop=True)
    points = pd.DataFrame({name: frames.numeric(rows, name, role="density") for name in ("x", "value")})
    points = points.assign(model_id=rows["model_id"]).dropna(subset=["x", "value"])
    lines = _by_setting(points, models, axis) if axis else _by_model(points, models, target)
    parts = [_mean(part).assign(label=label, line=name, n=part["model_id"].nunique()) for name, part in lines]
    return pd.concat(parts, ignore_index=True)[_COLUMNS] if parts else pd.DataFrame(columns=_COLUMNS)


def _by_model(points: pd.DataFrame, models: pd.DataFrame, target: str) -> Iterator[tuple[str, pd.DataFrame]]:
    for chosen in curves.representatives(models, list(points["model_id"].unique()), target=target):
        name = f"{chosen.name} ({chosen.about})" if chosen.about else chosen.name
        yield name, points[points["model_id"] == chosen.model_id]


def _by_setting(points: pd.DataFrame, models: pd.DataFrame, axis: str) -> Iterator[tuple[str, pd.DataFrame]]:
    table = models[frames.kept(models) & models["model_id"].isin(points["model_id"].unique())]
    values = frames.hashable(table[axis])
    for value in frames.spread(frames.ordered(table[axis]), MOST_LINES):
        owners = table.loc[values.isna() if value is None else values == value, "model_id"]
        yield f"{axis} {theme.format_value(value)}", points[points["model_id"].isin(owners)]


def _mean(points: pd.DataFrame) -> pd.DataFrame:
    """Return the mean density of several models at all their points, of which at most `MOST_POINTS`."""
    x = np.array(frames.spread(np.unique(points["x"]).tolist(), MOST_POINTS))
    total = np.zeros_like(x)
    groups = points.sort_values("x", kind="stable").groupby("model_id")
    for _, own in groups:
        total += np.interp(x, own["x"].to_numpy(), own["value"].to_numpy(), left=0.0, right=0.0)
    return pd.DataFrame({"x": x, "density": total / max(1, groups.ngroups)})


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a line for each model or value of the setting.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure, down to eight powers of ten below the highest peak.
    """
    figure, names = go.Figure(), list(data["line"].unique())
    colours = sample_colorscale(theme.SCALE, [0.9 * rank / max(1, len(names) - 1) for rank in range(len(names))])
    for rank, name in enumerate(names):
        part = data[data["line"] == name]
        figure.add_scatter(
            x=part["x"],
            y=part["density"].where(part["density"] > 0),
            name=html.escape(str(name)),
            mode="lines",
            showlegend=True,
            line={"color": colours[rank], "width": 1.8, "dash": theme.DASHES[rank % len(theme.DASHES)]},
            customdata=part["n"],
            hovertemplate="eigenvalue %{x:.4g}: %{y:.3g} (n = %{customdata})",
        )
    highest = data["density"].max()
    top = float(np.log10(highest)) if highest > 0 else 0.0
    # without limits the tails of the kernel, many powers of ten down, would be all that is seen
    figure.update_yaxes(type="log", range=[top - _DECADES, top + 0.3], exponentformat="power")
    figure.update_yaxes(title={"text": "density", "standoff": 14})
    figure.update_xaxes(title_text="eigenvalue of the Hessian, in the metric (nats)")
    return theme.layout(figure, height=420)
