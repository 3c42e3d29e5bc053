"""The report: one self-contained, interactive HTML page about a study's results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from flatmin.analysis import (
    choices,
    controls,
    frames,
    frequency,
    frequency_accuracy,
    listed,
    listed_frequency,
    page,
    published,
    sections,
)
from flatmin.analysis.section import Left, Section, Variant
from flatmin.errors import RequestError


def report(
    *,
    study: Mapping[str, object],
    models: pd.DataFrame,
    epochs: pd.DataFrame | None = None,
    sharpness: pd.DataFrame | None = None,
    spectra: pd.DataFrame | None = None,
    path: str | Path,
    target: str = "gen_gap",
    planned: int | None = None,
    failed: int | None = None,
    plan: pd.DataFrame | None = None,
    failures: pd.DataFrame | None = None,
    recipes: pd.DataFrame | None = None,
    refresh: float | None = None,
) -> Path:
    """Write the report of a study.

    The page opens from disk and asks nothing of a network. What does not fit the data is left out, and named.

    Args:
        study: The resolved study: `study`, `about`, `source`, `settings`, `axes`, `seeds`, `measures`; all
            optional.
        models: Rows of the `models/` table.
        epochs: Rows of the `epochs/` table.
        sharpness: Rows of the `sharpness/` table.
        spectra: Rows of the `spectra/` table: loss surfaces, spectral densities, Fourier coefficients.
        path: The HTML file to write; an old one is replaced in one step.
        target: The column that measures are compared with.
        planned: How many models the study plans; None when unknown.
        failed: How many of them failed; None when unknown.
        plan: Rows of the `plan/` table, for the coverage of the grid; None when unknown.
        failures: Rows of the `failures/` table, for the same; None when unknown.
        recipes: The settings of the models of a study with published numbers, as it trains them; None when it has none.
        refresh: Seconds after which the page loads itself again, the reader's choices kept; None: never.

    Returns:
        The path.

    Raises:
        RequestError: There is no model, or the target is no column of `models`.
    """
    path = Path(path)
    if models.empty:
        raise RequestError("there is no trained model to report on.")
    if path.is_dir():
        raise RequestError(f"{path}: is a directory; name the file to write, such as {path / 'report.html'}.")
    frames.check_columns(models, ["model_id", target], role="report")
    models = models.reset_index(drop=True)
    epochs = pd.DataFrame() if epochs is None else epochs
    sharpness = pd.DataFrame() if sharpness is None else sharpness
    views = choices.views(models, sharpness, target)
    waves = [] if spectra is None or spectra.empty else frequency.read(spectra, models)
    measured = frequency.with_ratios(sharpness, waves, models, epochs)
    of_all = frequency_accuracy.as_published(waves, epochs)
    compared = published.compare(models, measured, epochs, recipes=recipes, of_all=of_all)
    shown, left = sections.figures(
        views,
        epochs,
        sharpness,
        target=target,
        spectra=spectra,
        waves=waves,
        compared=compared,
        plan=plan,
        failures=failures,
    )
    state = controls.first(views, models, sharpness)
    facts = _execution(models)
    body = "\n".join(
        [
            _header(study, refresh),
            _headline(models, facts, planned, failed),
            controls.bar(views, models, sharpness),
            _findings(shown, state),
            "<main>",
            *[_figure(section, state) for section in shown],
            _left_out(left),
            listed_frequency.tables(waves, epochs, compared),
            listed.beside_published(compared, models),
            listed.at_equal_budget(models),
            *[listed.correlations(view, state) for view in views],
            listed.all_models(models, sharpness),
            listed.all_settings(study, models),
            "</main>",
            _footer(facts, models),
        ]
    )
    return _write(path, study, body, refresh)


def waiting(*, study: Mapping[str, object], path: str | Path, refresh: float) -> Path:
    """Write the page of a study that has no trained model yet, which loads itself again until there is one.

    Args:
        study: The resolved study, as for `report`.
        path: The HTML file to write; an old one is replaced in one step.
        refresh: Seconds between two loads.

    Returns:
        The path.

    Raises:
        RequestError: The file cannot be written.
    """
    body = f"{_header(study, refresh)}<main><section><p>No model is trained yet.</p></section></main>"
    return _write(Path(path), study, body, refresh)


def settle(path: Path) -> None:
    """Let a page that loads itself again do so no more.

    Args:
        path: What `report` or `waiting` wrote; nothing happens where it is missing.
    """
    if path.is_file():
        content = path.read_text(encoding="utf-8")
        page.write(path, re.sub(r'<body data-refresh="[^"]*">', "<body>", content, count=1))


def _write(path: Path, study: Mapping[str, object], body: str, refresh: float | None) -> Path:
    try:
        page.write(path, page.document(str(study.get("study") or "study"), body, refresh=refresh))
    except OSError as problem:
        raise RequestError(f"{path}: cannot be written ({problem.strerror}).") from problem
    return path


def _execution(models: pd.DataFrame) -> dict[str, list[str]]:
    """The distinct versions, commits and stack sizes in the `execution` column."""
    found: dict[str, set[str]] = {}
    column = models["execution"] if "execution" in models.columns else pd.Series(dtype=object)
    for entry in column.dropna().unique():
        try:
            facts = json.loads(entry)
        except (TypeError, ValueError):
            continue
        if not isinstance(facts, dict):
            continue
        versions = facts.get("versions")
        pairs = list(versions.items()) if isinstance(versions, dict) else []
        pairs += [(key, facts[key]) for key in ("commit", "compile", "stack_size") if facts.get(key) is not None]
        for key, value in pairs:
            found.setdefault(str(key), set()).add(str(value))
    return {key: sorted(values) for key, values in sorted(found.items())}


def _header(study: Mapping[str, object], refresh: float | None) -> str:
    about = f'<p class="about">{page.text(study["about"])}</p>' if study.get("about") else ""
    source = f'<p class="source">Source: {page.text(study["source"])}</p>' if study.get("source") else ""
    live = ""
    if refresh is not None:
        live = (
            f'<p class="live">Live, as of {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC; looks again every {refresh:g} s. '
            '<button type="button" id="live" aria-pressed="true">Follow</button></p>'
        )
    return f"<header><h1>{page.text(study.get('study') or 'study')}</h1>{about}{source}{live}</header>"


def _headline(models: pd.DataFrame, facts: dict[str, list[str]], planned: int | None, failed: int | None) -> str:
    counts = models["status"].value_counts() if "status" in models.columns else pd.Series(dtype=int)
    tiles: list[tuple[object, str]] = [(len(models), "models" if planned is None else f"of {planned} models")]
    tiles += [(int(counts.get(status, 0)), status) for status in frames.STATUSES]
    if failed is not None:
        tiles.append((failed, "failed"))
    if "seconds" in models.columns:
        tiles.append((_duration(_seconds(models)), "training time"))
    for column, word in (("host", "host"), ("device", "device")):
        if column in models.columns and models[column].notna().any():
            values = sorted(models[column].dropna().astype(str).unique())
            tiles.append((values[0] if len(values) == 1 else len(values), word if len(values) == 1 else f"{word}s"))
    if "torch" in facts:
        tiles.append((", ".join(facts["torch"]), "torch"))
    items = "".join(
        f"<li><strong>{page.text(value)}</strong> <span>{page.text(word)}</span></li>" for value, word in tiles
    )
    return f'<ul class="headline">{items}</ul>'


def _seconds(models: pd.DataFrame) -> float:
    """Wall-clock seconds of all stacks: each model's `seconds` is its share of its stack's."""
    return float(pd.Series(frames.numeric(models, "seconds", role="report")).sum())


def _duration(seconds: float) -> str:
    """Return seconds as people say them: 45 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _findings(shown: Sequence[Section], state: Mapping[str, str]) -> str:
    said = "".join(
        # what a finding says of all measures holds whichever one is looked at
        f"<p{controls.only({name: variant.of[name] for name in variant.of if name != 'measure'}, state)}>"
        f"{page.text(finding)}</p>"
        for section in sorted(shown, key=lambda section: section.name != "correlations")
        for variant in section.variants
        if isinstance(variant, Variant)
        for finding in variant.findings
    )
    return f'<section class="finding" id="conclusions" aria-live="polite">{said}</section>' if said else ""


def _figure(section: Section, state: Mapping[str, str]) -> str:
    first = next(one for one in section.variants if controls.fits(one.of, state))
    figure = isinstance(first, Variant)
    caption = first.caption if isinstance(first, Variant) else f"No figure for this choice: {first.reason}"
    height = first.figure["layout"]["height"] if isinstance(first, Variant) else 0
    return (
        f'<figure id="figure-{section.name}"><h2>{page.text(section.heading)}</h2>'
        f'<div class="scroll"><div class="plot" data-figure="{section.name}" style="min-height:{height}px"></div></div>'
        f'<figcaption><span class="caption">{page.text(caption)}</span>'
        f' <button type="button" class="download" data-table="{section.name}"{"" if figure else " disabled"}>'
        f"Download data (CSV)</button></figcaption></figure>\n"
        f"{page.embed_figures(section.name, section.variants)}"
    )


def _left_out(left: Sequence[Left]) -> str:
    if not left:
        return ""
    items = "".join(f"<li>{page.text(item.heading)}: {page.text(item.reason)}</li>" for item in left)
    return f'<section class="left"><h2>Left out</h2><ul>{items}</ul></section>'


def _footer(facts: dict[str, list[str]], models: pd.DataFrame) -> str:
    said = [f"{key} {', '.join(values)}" for key, values in facts.items()]
    if "started_at" in models.columns and models["started_at"].notna().any():
        said.append(f"started {models['started_at'].dropna().min()} to {models['started_at'].dropna().max()}")
    return f"<footer><p>Written by flatmin-sweep. {page.text('; '.join(said))}</p></footer>"
