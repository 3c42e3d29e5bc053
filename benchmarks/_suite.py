"""The whole suite of measures beside the published procedure: a part of `sharpness.py`."""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from _published import Published
from _trained import TOLERANCE, Timer, Trained
from rich import box
from rich.console import Console
from rich.table import Table

from flatmin.sharpness import measure

SERVED_BY_LANCZOS = ("hessian_trace", "lambda_max", "effective_dimension")
WHOLE_SET_ONLY = ("eps_sharpness", "local_entropy_gradient", "effective_dimension")


def labels(options: argparse.Namespace, subset: int | None) -> list[str]:
    """Return our measures, to the tolerance; on a subset where they can be taken on one."""
    chains = min(256, max(1, (options.examples - 1) // 16))  # 16 batches at least, or there is no standard error
    arguments = {
        "shannon_entropy": {},
        "eps_sharpness": {"tolerance": TOLERANCE},
        "pac_bayes": {"tolerance": TOLERANCE},
        "lpf": {"tolerance": TOLERANCE},
        "local_entropy": {"tolerance": TOLERANCE},
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
        own = own | ({} if subset is None or name in WHOLE_SET_ONLY else {"subset": subset})
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


def suite(subject: Trained, options: argparse.Namespace) -> None:
    """Compare the suites and print the figures."""
    found, memory = Suite(), int(options.memory * 2**30)
    for _ in range(options.repetitions):
        with found.one_pass.running():
            subject.loss()
        found.frames = []
        for timer, subset in ((found.whole, None), (found.part, options.subset))[: 2 if options.subset else 1]:
            with timer.running():
                written = labels(options, subset)
                found.frames.append(
                    measure(subject.model, "cross_entropy", (subject.x, subject.y), written, memory=memory)
                )
        run_published(subject, options, found)
    show_suite(found, options)


def run_published(subject: Trained, options: argparse.Namespace, found: Suite) -> None:
    """Run the published procedure, or a fraction of each of its loops, and note the scaled seconds."""
    procedure, wall = Published(subject.model, subject.x, subject.y), 0.0
    for name, part, units in procedure.runs(1.0 if options.full else options.fraction):
        if all(served in options.without for served in (SERVED_BY_LANCZOS if name == "Lanczos" else (name,))):
            continue
        timer = Timer()
        with timer.running():
            value = part.run(units)
        scale = part.units / units
        found.published.setdefault(name, []).append(timer.median() * scale)
        wall += timer.wall[0] * scale
        found.values[name] = f"{value:.4g}" + ("" if units == part.units else f" ({units} of {part.units})")
    found.published_wall.append(wall)


def show_suite(found: Suite, options: argparse.Namespace) -> None:
    """Print a table of measures and one of the whole."""
    unit = found.one_pass.median()
    columns = (
        "measure",
        "published",
        "seconds",
        "passes",
        "ours",
        "error",
        "seconds",
        "passes",
        "ours, subset",
        "error",
    )
    table = Table(*columns, "seconds", box=box.MARKDOWN, title="the suite, measure by measure")
    whole, part = (found.frames[place].set_index("measure") for place in (0, -1))
    for name in whole.index:
        source = "Lanczos" if name in SERVED_BY_LANCZOS else name
        seconds = statistics.median(found.published[source])
        shared = name in SERVED_BY_LANCZOS[:1] + SERVED_BY_LANCZOS[2:]
        theirs = (
            ["with lambda_max", "", ""] if shared else [found.values[source], f"{seconds:.1f}", f"{seconds / unit:.0f}"]
        )
        own, sub = whole.loc[name], of_row(part.loc[name]) if options.subset else ()
        table.add_row(name, *theirs, *of_row(own), f"{own['seconds'] / unit:.0f}", *sub)
    Console(width=200).print(table)
    print(
        "Ours are wall seconds, and what measures share is paid by the first that asks for it. Errors are in per cent "
        "of the value; ! marks one that did not converge."
    )
    totals = [float(total) for total in np.sum(list(found.published.values()), axis=0)]
    lines = Table("suite", "CPU seconds", "spread", "wall", "passes", "published / it", box=box.MARKDOWN)
    rows = [
        ("published, " + ("in full" if options.full else "scaled"), totals, found.published_wall),
        ("ours, all examples", found.whole.of_device(), found.whole.wall),
        (f"ours, subset of {options.subset}", found.part.of_device(), found.part.wall),
    ]
    for name, of_suite, wall in rows[: 3 if options.subset else 2]:
        own = statistics.median(of_suite)
        ratio = statistics.median(a / b for a, b in zip(totals, of_suite, strict=True))
        spread = f"{min(of_suite):.1f} to {max(of_suite):.1f}"
        cells = (f"{own:.1f}", spread, f"{statistics.median(wall):.1f}", f"{own / unit:.0f}", f"{ratio:.2f}")
        lines.add_row(name, *cells)
    Console(width=120).print(lines)


def of_row(row: pd.Series[Any]) -> tuple[str, str, str]:
    """Return a measure's value, its relative error and its seconds, written."""
    if not math.isfinite(row["value"]):
        return "undefined", "", f"{row['seconds']:.1f}"
    error = 100 * row["stderr"] / abs(row["value"]) if row["value"] else 0.0
    return f"{row['value']:.4g}", f"{error:.1f}" + ("" if row["converged"] else " !"), f"{row['seconds']:.1f}"
