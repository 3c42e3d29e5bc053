"""The report: one self-contained, interactive HTML page about a study's results."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flatmin.analysis import choices, controls, frames, page, published, sections
from flatmin.analysis.association import MeasureCorrelation
from flatmin.analysis.choices import View
from flatmin.analysis.section import Left, Section, Variant
from flatmin.analysis.tuned import tuned
from flatmin.errors import RequestError

_LISTED = ("status", "epochs_run", "train_loss", "train_acc", "test_loss", "test_acc", "gen_gap", "seconds")


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
) -> Path:
    """Write the report of a study.

    The page opens from disk and asks nothing of a network. What does not fit the data is left out, and named.

    Args:
        study: The resolved study: `study`, `about`, `source`, `settings`, `axes`, `seeds`, `measures`; all
            optional.
        models: Rows of the `models/` table.
        epochs: Rows of the `epochs/` table.
        sharpness: Rows of the `sharpness/` table.
        spectra: Rows of the `spectra/` table: loss surfaces and spectral densities.
        path: The HTML file to write; an old one is replaced in one step.
        target: The column that measures are compared with.
        planned: How many models the study plans; None when unknown.
        failed: How many of them failed; None when unknown.
        plan: Rows of the `plan/` table, for the coverage of the grid; None when unknown.
        failures: Rows of the `failures/` table, for the same; None when unknown.
        recipes: The settings of the models of a study with published numbers, as it trains them; None when it has none.

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
    compared = published.compare(models, sharpness, epochs, recipes=recipes)
    shown, left = sections.figures(
        views,
        epochs,
        sharpness,
        target=target,
        spectra=spectra,
        compared=compared,
        plan=plan,
        failures=failures,
    )
    state = controls.first(views, models, sharpness)
    facts = _execution(models)
    body = "\n".join(
        [
            _header(study),
            _headline(models, facts, planned, failed),
            controls.bar(views, models, sharpness),
            _findings(shown, state),
            "<main>",
            *[_figure(section, state) for section in shown],
            _left_out(left),
            _published(compared, models),
            _tuned(models),
            *[_correlation_table(view, state) for view in views],
            _model_table(models, sharpness),
            _settings(study, models),
            "</main>",
            _footer(facts, models),
        ]
    )
    try:
        page.write(path, page.document(str(study.get("study") or "study"), body))
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


def _header(study: Mapping[str, object]) -> str:
    about = f'<p class="about">{page.text(study["about"])}</p>' if study.get("about") else ""
    source = f'<p class="source">Source: {page.text(study["source"])}</p>' if study.get("source") else ""
    return f"<header><h1>{page.text(study.get('study') or 'study')}</h1>{about}{source}</header>"


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
        f'<div class="plot" data-figure="{section.name}" style="min-height:{height}px"></div>'
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


def _correlation_table(view: View, state: Mapping[str, str]) -> str:
    result = view.result
    heading = f"<section{controls.only(view.of, state)}><h2>Correlations</h2>"
    if result is None:
        return f"{heading}<p>No correlation: {page.text(view.reason)}</p></section>"
    rows = []
    for name, one in sorted(
        result.measures.items(), key=lambda item: -(item[1].tau if item[1].tau is not None else -2)
    ):
        rows.append(_correlation_row(name, one))
    rows += [_correlation_row(f"{name} (control)", one) for name, one in result.controls.items()]
    header = [
        "measure",
        "Kendall τ",
        "95 % interval",
        "n",
        "configurations",
        "τ over rows",
        "Spearman",
        "Pearson",
        "partial",
        "95 % interval",
        "sign changes",
        "Ψ",
        "CMI",
        "q",
    ]
    dropped = "; ".join(f"{reason} ({count})" for reason, count in result.dropped.items())
    how = "τ, Spearman and Pearson on seed means" if view.seeds == "means" else "τ over models, without intervals"
    notes = [f"Target: {result.target}. {how}; partial: rank correlation given {', '.join(result.axes) or 'nothing'}."]
    notes += [f"Left out: {dropped}."] if dropped else []
    notes += [f"{note}." for note in result.notes]
    note = f'<p class="note">{page.text(" ".join(notes))}</p>'
    return f"{heading}{page.table(header, rows, kind='numbers')}{note}</section>"


def _correlation_row(name: str, one: MeasureCorrelation) -> tuple[object, ...]:
    def number(value: float | None) -> str | None:
        return None if value is None else f"{value:.3f}"

    def interval(low: float | None, high: float | None) -> str | None:
        return None if low is None or high is None else f"[{low:.3f}, {high:.3f}]"

    return (
        name,
        number(one.tau),
        interval(one.tau_low, one.tau_high),
        one.n,
        one.n_configs,
        *map(number, (one.tau_rows, one.spearman, one.pearson, one.partial)),
        interval(one.partial_low, one.partial_high),
        None if one.sign_flip is None else "yes" if one.sign_flip else "no",
        *map(number, (one.psi_mean, one.cmi, one.q)),
    )


def _published(compared: pd.DataFrame, models: pd.DataFrame) -> str:
    """The published numbers with ours, where the study has any; nothing else."""
    heading = f'<section id="published"><h2>{page.text(sections.PUBLISHED)}</h2>'
    if published.small_twin(models):
        return f"{heading}<p>Small twin: not comparable with the published numbers.</p></section>"
    if compared.empty:
        return ""
    known = compared[compared["ours"].notna()]
    notes: dict[str, int] = {}
    rows = [_published_row(row, notes) for row in known.to_dict("records")]
    header = [
        "quantity",
        "settings",
        "as printed",
        "theirs",
        "n",
        "ours",
        "sd",
        "n",
        "ours − theirs",
        "standard errors",
    ]
    table = page.table([*header, "notes"], rows) if rows else ""
    listed = "".join(f"<li>{page.text(note)}</li>" for note in notes)
    said = "Accuracies are fractions, losses nats; sd is a sample deviation over models."
    reasons = compared.loc[compared["ours"].isna(), "missing"].value_counts()
    rest = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
    said += f" Published numbers without one of ours: {rest}." if rest else ""
    return f'{heading}{table}<p class="note">{page.text(said)}</p><ol class="note">{listed}</ol></section>'


def _published_row(row: Mapping[Hashable, Any], notes: dict[str, int]) -> tuple[object, ...]:
    """One row of the table; what is said of it gets the number that it has in `notes`, or the next one."""
    said = filter(None, [*row["conventions"].split("; "), row["source"]])
    error = row["standard_errors"]
    return (
        row["quantity"] if frames.is_null(row["epoch"]) else f"{row['quantity']}, epoch {row['epoch']}",
        published.in_words(row["settings"]),
        row["printed"],
        row["value"],
        row["n"],
        row["ours"],
        row["ours_sd"],
        row["ours_n"],
        row["difference"],
        None if frames.is_null(error) else f"{error:+.1f}",
        ", ".join(str(notes.setdefault(note, len(notes) + 1)) for note in said),
    )


def _tuned(models: pd.DataFrame) -> str:
    """Every optimizer at the point that held-out examples choose, where there is something to choose; else nothing."""
    chosen = tuned(models)
    if chosen.empty:
        return ""
    note = (
        "Of the points of each optimizer, the one with the highest mean val_acc over seeds; of equal ones the lower "
        "val_loss. test_acc is its mean over n seeds, test_se the standard error. The test set chooses nothing."
    )
    if chosen["points"].nunique() > 1:
        note += " The budgets are not equal: some optimizers have other numbers of points."
    table = page.table(list(chosen.columns), chosen.itertuples(index=False), kind="numbers")
    heading = '<section id="tuned"><h2>Optimizers at an equal budget</h2>'
    return f'{heading}{table}<p class="note">{page.text(note)}</p></section>'


def _model_table(models: pd.DataFrame, sharpness: pd.DataFrame) -> str:
    table = frames.wide(models, sharpness)
    labels = frames.labels(sharpness)
    seeds = [name for name in frames.SEED_COLUMNS if name in models.columns and models[name].nunique() > 1]
    # A seed of one stream is `seed` unless it was given; only then it tells something.
    seeds = [name for name in seeds if name == "seed" or "seed" not in seeds or not models[name].equals(models["seed"])]
    chosen = [
        "model_id",
        *frames.varying(models),
        *seeds,
        *[name for name in _LISTED if name in models],
        *labels,
    ]
    rows = table[list(dict.fromkeys(chosen))]
    return (
        '<section id="models"><h2>Models</h2>'
        '<div class="tools"><label>Filter <input type="search" id="filter" '
        'placeholder="width=8 test_acc>0.9 diverged" autocomplete="off" spellcheck="false"></label>'
        '<span id="count" role="status"></span>'
        '<button type="button" class="download" data-table="models">Download data (CSV)</button></div>'
        '<div class="scroll"><table id="model-table" class="numbers"></table></div>'
        '<div class="pager"><button type="button" id="previous">Previous</button>'
        '<span id="page"></span><button type="button" id="next">Next</button></div></section>\n'
        f"{page.embed_frame('data-models', rows)}"
    )


def _settings(study: Mapping[str, object], models: pd.DataFrame) -> str:
    axes = set(frames.varying(models)) | frames.RESULT_COLUMNS | set(frames.SEED_COLUMNS)
    fixed = [(column, models[column].iloc[0]) for column in models.columns if column not in axes]
    rows = [(axis, frames.ordered(models[axis])) for axis in frames.varying(models)]
    asked = [(key, study[key]) for key in ("seeds", "measures") if study.get(key)]
    rows += [(name, value) for name, value in [*asked, *fixed] if page.text(value) != "–"]
    table = page.table(["setting", "value"], rows)
    return f"<section><details><summary>Settings</summary>{table}</details></section>"


def _footer(facts: dict[str, list[str]], models: pd.DataFrame) -> str:
    said = [f"{key} {', '.join(values)}" for key, values in facts.items()]
    if "started_at" in models.columns and models["started_at"].notna().any():
        said.append(f"started {models['started_at'].dropna().min()} to {models['started_at'].dropna().max()}")
    return f"<footer><p>Written by flatmin-sweep. {page.text('; '.join(said))}</p></footer>"
