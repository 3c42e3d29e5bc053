"""The report: one self-contained, interactive HTML page about a study's results."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from flatmin.analysis import frames, page, published, sections
from flatmin.analysis.correlation import Correlations, correlate
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
    result, reason = _correlations(models, sharpness, target)
    compared = published.compare(models, sharpness, epochs)
    shown, left = sections.figures(models, epochs, sharpness, result, target=target, spectra=spectra, compared=compared)
    facts = _execution(models)
    body = "\n".join(
        [
            _header(study),
            _headline(models, facts, planned, failed),
            _findings(shown),
            "<main>",
            *[_figure(section) for section in shown],
            _left_out(left),
            _published(compared, models),
            _tuned(models),
            _correlation_table(result, reason),
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


def _correlations(models: pd.DataFrame, sharpness: pd.DataFrame, target: str) -> tuple[Correlations | None, str]:
    if sharpness.empty:
        return None, "no measure was taken."
    try:
        return correlate(models, sharpness, target=target), ""
    except RequestError as problem:
        return None, str(problem)


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


def _findings(shown: list[sections.Section]) -> str:
    said = "".join(f"<p>{page.text(finding)}</p>" for section in shown for finding in section.findings)
    return f'<section class="finding">{said}</section>' if said else ""


def _figure(section: sections.Section) -> str:
    figure, height = section.figure.to_json(), section.figure.layout.height
    return (
        f'<figure id="figure-{section.name}"><h2>{page.text(section.heading)}</h2>'
        f'<div class="plot" data-figure="{section.name}" style="min-height:{height}px"></div>'
        f"<figcaption>{page.text(section.caption)}"
        f' <button type="button" class="download" data-table="{section.name}">Download data (CSV)</button>'
        f"</figcaption></figure>\n"
        f"{page.embed(f'plot-{section.name}', str(figure))}\n"
        f"{page.embed_frame(f'data-{section.name}', section.data)}"
    )


def _left_out(left: list[sections.Left]) -> str:
    if not left:
        return ""
    items = "".join(f"<li>{page.text(item.heading)}: {page.text(item.reason)}</li>" for item in left)
    return f'<section class="left"><h2>Left out</h2><ul>{items}</ul></section>'


def _correlation_table(result: Correlations | None, reason: str) -> str:
    heading = "<section><h2>Correlations</h2>"
    if result is None:
        return f"{heading}<p>No correlation: {page.text(reason)}</p></section>"
    rows = []
    for name, one in sorted(
        result.measures.items(), key=lambda item: -(item[1].tau if item[1].tau is not None else -2)
    ):
        interval = "–" if one.tau_low is None else f"[{one.tau_low:.3f}, {one.tau_high:.3f}]"
        numbers = [
            "–" if value is None else f"{value:.3f}" for value in (one.tau, one.tau_rows, one.spearman, one.pearson)
        ]
        rows.append([name, numbers[0], interval, one.n, one.n_configs, *numbers[1:]])
    header = [
        "measure",
        "Kendall τ",
        "95 % interval",
        "n",
        "configurations",
        "τ over rows",
        "Spearman",
        "Pearson",
    ]
    dropped = "; ".join(f"{reason} ({count})" for reason, count in result.dropped.items())
    notes = [f"Target: {result.target}. τ, Spearman and Pearson on seed means."]
    notes += [f"Left out: {dropped}."] if dropped else []
    notes += [f"{note}." for note in result.notes]
    note = f'<p class="note">{page.text(" ".join(notes))}</p>'
    return f"{heading}{page.table(header, rows, kind='numbers')}{note}</section>"


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
