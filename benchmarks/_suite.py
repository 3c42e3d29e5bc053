"""The whole suite of measures beside the published procedure: a part of `sharpness.py`."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from _published import Published
from _trained import TOLERANCE, Timer, Trained
from rich import box
from rich.table import Table

from flatmin.sharpness import measure

SERVED_BY_LANCZOS = ("hessian_trace", "lambda_max", "effective_dimension")
WHOLE_SET_ONLY = ("eps_sharpness", "local_entropy_gradient", "effective_dimension")
NOTE = (
    "Ours are wall seconds, scaled to the suite's CPU seconds, and what measures share is paid by the first that "
    "asks for it; errors are in per cent of the value, ! marks one that did not converge"
)


def labels(options: argparse.Namespace, subset: int | None) -> list[str]:
    """Return our measures, to the tolerance; on a subset where they can be taken on one."""
    chains = min(256, max(1, (options.examples - 1) // 16))  # 16 batches at least, or there is no standard error
    arguments = {
        "shannon_entropy": {},
        "eps_sharpness": {"tolerance": TOLERANCE},
        "pac_bayes": {"tolerance": TOLERANCE},
        "lpf": {"tolerance": TOLERANCE},
        "local_entropy": {"tolerance": TOLERANCE, "exponent": "loss", "deviation": "reciprocal"},
        "local_entropy_gradient": {"tolerance": TOLERANCE, "batch": chains, "times_gamma": "false"},
        "fisher_rao": {"fisher": "hessian"},
        "lambda_max": {"tolerance": TOLERANCE},
        "hessian_trace": {"tolerance": TOLERANCE},
        "hessian_frobenius": {"tolerance": TOLERANCE},
        "effective_dimension": {"tolerance": TOLERANCE},
    }
    written = []
    for name in [name for name in arguments if name not in options.without]:
        own = arguments[name]
        if subset is not None and name not in WHOLE_SET_ONLY:
            own = own | {"subset": subset, "subset_stratified": "true"}
        written.append(f"{name}({', '.join(f'{key}={value}' for key, value in own.items())})" if own else name)
    return written


@dataclass
class Suite:
    """What was found of the suite."""

    one_pass: Timer = field(default_factory=Timer)
    whole: Timer = field(default_factory=Timer)
    part: Timer = field(default_factory=Timer)
    published: dict[str, list[float]] = field(default_factory=dict)
    published_wall: list[float] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    frames: list[pd.DataFrame] = field(default_factory=list)


def suite(subject: Trained, options: argparse.Namespace) -> Iterator[tuple[Table, str]]:
    """Compare the suites and yield a table of measures and one of the whole, with notes."""
    found, memory = Suite(), int(options.memory * 2**30)
    for _ in range(options.repetitions):
        with found.one_pass.running():
            subject.loss()
        found.frames = []
        for timer, subset in ours(found, options):
            with timer.running():
                written = labels(options, subset)
                found.frames.append(
                    measure(subject.model, "cross_entropy", (subject.x, subject.y), written, memory=memory)
                )
        run_published(subject, options, found)
    size = f"{options.examples} examples, width {options.width}"
    part = "" if options.full else f"{100 * options.fraction:g} % of the published loops were run, and scaled"
    if options.published_examples < options.examples:
        part += f"; their passes were over {options.published_examples} of the examples, and scaled as well"
    yield by_measure(found, options, f"The suite against the published procedure, measure by measure: {size}"), NOTE
    yield as_a_whole(found, options, f"The suite against the published procedure, as a whole: {size}"), part


def heads(found: Suite, options: argparse.Namespace) -> list[tuple[str, Timer]]:
    """Return the names of our suites, with their timers."""
    return [
        ("ours" if subset is None else f"ours, subset of {subset}", timer) for timer, subset in ours(found, options)
    ]


def ours(found: Suite, options: argparse.Namespace) -> list[tuple[Timer, int | None]]:
    """Return which of our suites are run: each one's timer, and of how many examples its subset is."""
    whole: list[tuple[Timer, int | None]] = [] if options.only_subset else [(found.whole, None)]
    return whole + ([(found.part, options.subset)] if options.subset else [])


def run_published(subject: Trained, options: argparse.Namespace, found: Suite) -> None:
    """Run the published procedure, or a fraction of each of its loops, and note the scaled seconds."""
    fewer = subject.first(options.published_examples)
    procedure, wall = Published(fewer.model, fewer.x, fewer.y), 0.0
    for name, part, units in procedure.runs(1.0 if options.full else options.fraction):
        if all(served in options.without for served in (SERVED_BY_LANCZOS if name == "Lanczos" else (name,))):
            continue
        timer = Timer()
        with timer.running():
            value = part.run(units)
        scale = part.units / units * options.examples / options.published_examples
        found.published.setdefault(name, []).append(timer.median() * scale)
        wall += timer.wall[0] * scale
        found.values[name] = f"{value:.4g}" + ("" if units == part.units else f" ({units} of {part.units})")
    found.published_wall.append(wall)


def by_measure(found: Suite, options: argparse.Namespace, title: str) -> Table:
    """Return a table of measures."""
    unit, suites = found.one_pass.median(), heads(found, options)
    columns = [text for head, _ in suites for text in (head, "error", "seconds", "passes")]
    table = Table("measure", "published", "seconds", "passes", *columns, box=box.MARKDOWN, title=title)
    frames = [frame.set_index("measure") for frame in found.frames]
    scales = [timer.of_device()[-1] / timer.wall[-1] for _, timer in suites]
    for name in frames[0].index:
        source = "Lanczos" if name in SERVED_BY_LANCZOS else name
        seconds = statistics.median(found.published[source])
        shared = name in SERVED_BY_LANCZOS[:1] + SERVED_BY_LANCZOS[2:]
        theirs = (
            ["with lambda_max", "", ""] if shared else [found.values[source], f"{seconds:.1f}", f"{seconds / unit:.0f}"]
        )
        cells = [of_row(frame.loc[name], unit, scale) for frame, scale in zip(frames, scales, strict=True)]
        table.add_row(name, *theirs, *(cell for own in cells for cell in own))
    return table


def as_a_whole(found: Suite, options: argparse.Namespace, title: str) -> Table:
    """Return a table of the suites."""
    unit = found.one_pass.median()
    totals = [float(total) for total in np.sum(list(found.published.values()), axis=0)]
    lines = Table("suite", "CPU seconds", "spread", "wall", "passes", "published / it", box=box.MARKDOWN, title=title)
    rows = [("published, " + ("in full" if options.full else "scaled"), totals, found.published_wall)]
    for name, of_suite, wall in rows + [(head, timer.of_device(), timer.wall) for head, timer in heads(found, options)]:
        own = statistics.median(of_suite)
        ratio = statistics.median(a / b for a, b in zip(totals, of_suite, strict=True))
        spread = f"{min(of_suite):.1f} to {max(of_suite):.1f}"
        cells = (f"{own:.1f}", spread, f"{statistics.median(wall):.1f}", f"{own / unit:.0f}", f"{ratio:.2f}")
        lines.add_row(name, *cells)
    return lines


def of_row(row: pd.Series[Any], unit: float, scale: float) -> tuple[str, str, str, str]:
    """Return a measure's value, its relative error, its scaled seconds and how many passes they are, written."""
    seconds = row["seconds"] * scale
    cost = f"{seconds:.1f}", f"{seconds / unit:.1f}"
    if not math.isfinite(row["value"]):
        return "undefined", "", *cost
    error = 100 * row["stderr"] / abs(row["value"]) if row["value"] else 0.0
    return f"{row['value']:.4g}", f"{error:.1f}" + ("" if row["converged"] else " !"), *cost
