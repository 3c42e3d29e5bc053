"""The report's tables: correlations, published numbers, optimizers at an equal budget, models, settings."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from flatmin.analysis import controls, frames, page, published, sections
from flatmin.analysis.association import MeasureCorrelation
from flatmin.analysis.choices import View
from flatmin.analysis.tuned import tuned

_LISTED = ("status", "epochs_run", "train_loss", "train_acc", "test_loss", "test_acc", "gen_gap", "seconds")


def correlations(view: View, state: Mapping[str, str]) -> str:
    """Return the correlations of one choice as HTML.

    Args:
        view: The tables of the choice.
        state: What is chosen at the beginning.
    """
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
    notes += [f"{note[0].upper()}{note[1:]}." for note in result.notes]
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


def beside_published(compared: pd.DataFrame, models: pd.DataFrame) -> str:
    """Return the published numbers with ours as HTML, where the study has any; else nothing.

    Args:
        compared: What `published.compare` returned.
        models: Rows of the `models/` table.
    """
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
    said = "Accuracies are fractions, losses nats (of regressions mean squares); sd is a sample deviation over models."
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


def at_equal_budget(models: pd.DataFrame) -> str:
    """Return every optimizer at the point that held-out examples choose, where there is a choice; else nothing.

    Args:
        models: Rows of the `models/` table.
    """
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


def all_models(models: pd.DataFrame, sharpness: pd.DataFrame) -> str:
    """Return the table of models, which the page's script fills, and its data.

    Args:
        models: Rows of the `models/` table.
        sharpness: Rows of the `sharpness/` table; may be empty.
    """
    table = frames.wide(models, sharpness)
    labels = frames.labels(sharpness)
    seeds = [name for name in models.columns if frames.is_seed(name) and models[name].nunique() > 1]
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


def all_settings(study: Mapping[str, object], models: pd.DataFrame) -> str:
    """Return the settings as HTML: those that vary with their values, then those that are the same for all.

    Args:
        study: The resolved study.
        models: Rows of the `models/` table.
    """
    axes = set(frames.varying(models)) | frames.RESULT_COLUMNS
    fixed = [
        (column, models[column].iloc[0])
        for column in models.columns
        if column not in axes and not (frames.is_seed(column) and models[column].nunique() > 1)
    ]
    rows = [(axis, frames.ordered(models[axis])) for axis in frames.varying(models)]
    asked = [(key, study[key]) for key in ("seeds", "measures") if study.get(key)]
    rows += [(name, value) for name, value in [*asked, *fixed] if page.text(value) != "–"]
    table = page.table(["setting", "value"], rows)
    return f"<section><details><summary>Settings</summary>{table}</details></section>"
