"""Sharpness measures of one trained narrow ResNet-18, three comparisons in one run on one core.

Suite: all measures of the published procedure to a standard error of 2 %, on all examples and on a random subset of
them (whose sampling error is then in the standard error), against that procedure in plain PyTorch (`_published.py`).
By default a fraction of each of its loops is run, and its time is scaled by how much was left out: every loop is so
many equal units, one at least is run, and eps_sharpness, whose length is not known beforehand, is run to its end.

Peers: each measure that rests on Hessian-vector products against PyHessian and curvlinops at equal error, in the metric
`identity`, all on the same batches. Ours is measured to its tolerance and the error that it reached is the target.
Peers run a pilot, and the sample variance over its probes says how many reach the target: n = variance / target^2,
for a Frobenius norm by the delta method. Whole runs of Hutch++ are the probes of that method, as large as ours was.
Largest eigenvalues are asked for to the same tolerance, which is a residual's, except PyHessian's. Densities take as
many products as ours: peers do not tell the bias of theirs.

Products: what a Hessian-vector product costs in gradients, on one batch.

Contenders run in turn. Seconds are CPU seconds of the process (wall beside them for the suite), for a machine that
others use too; pass-equivalents are these divided by those of one forward pass over the examples. Printed are medians
over the repetitions.

    python benchmarks/sharpness.py [--large] [--full] [--width 4] [--examples 512] [--part products]
"""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _published import BATCH, Published
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional

from flatmin.sharpness import Engine, measure
from flatmin.stack import Batch, StackedNetwork, stream_key
from flatmin.trainables.networks.resnet18_narrow import resnet18_narrow

TOLERANCE = 0.02
SHAPE, CLASSES = (3, 32, 32), 10
PEERS = {"pyhessian": "PyHessian", "curvlinops": "curvlinops-for-pytorch"}
SERVED_BY_LANCZOS = ("hessian_trace", "lambda_max", "effective_dimension")
WHOLE_SET_ONLY = ("eps_sharpness", "local_entropy_gradient")
CHUNK, VECTORS = 64, 8


@dataclass
class Timer:
    """CPU and wall seconds of what was done under it, one number per time."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is done inside, to the end of what was asked of the device."""
        wall, cpu = now(), time.process_time()
        yield
        self.wall.append(now() - wall)
        self.cpu.append(time.process_time() - cpu)

    def median(self) -> float:
        """Return the median of the CPU seconds; of the wall's on a GPU, where the CPU waits."""
        return statistics.median(self.of_device())

    def of_device(self) -> list[float]:
        """Return the seconds that count on this device."""
        return self.wall if torch.cuda.is_available() else self.cpu


def now() -> float:
    """Return the time, when all that was asked of the device has been done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Trained:
    """A trained network and the examples it was trained on."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def first(self, count: int) -> Trained:
        """Return it with the first examples only."""
        return Trained(self.model, self.x[:count], self.y[:count])

    def loss(self) -> float:
        """Return the mean loss, by the plainest forward pass."""
        with torch.no_grad():
            parts = zip(torch.split(self.x, BATCH), torch.split(self.y, BATCH), strict=True)
            return sum(float(functional.cross_entropy(self.model(x), y, reduction="sum")) for x, y in parts) / len(
                self.x
            )

    def engine(self, memory: int = 2**31) -> Engine:
        """Return our engine of it."""
        params, buffers = StackedNetwork.stack([self.model])
        key = torch.tensor([stream_key("measure", 0)], device=self.x.device)
        batches = [Batch(self.x, self.y[None], shared=True)]
        return Engine(StackedNetwork(self.model), params, buffers, batches, key, memory=memory)


def trained(options: argparse.Namespace) -> Trained:
    """Train the network on generated images: a smooth pattern per class under noise, one label in ten random."""
    generator = torch.Generator().manual_seed(0)
    patterns = functional.interpolate(torch.randn(CLASSES, 3, 4, 4, generator=generator), SHAPE[1:], mode="bilinear")
    y = torch.randint(CLASSES, (options.examples,), generator=generator)
    x = patterns[y] + torch.randn(options.examples, *SHAPE, generator=generator)
    noisy = torch.rand(options.examples, generator=generator) < 0.1
    y = torch.where(noisy, torch.randint(CLASSES, y.shape, generator=generator), y)
    torch.manual_seed(0)
    x, y = x.to(options.device), y.to(options.device)
    model = resnet18_narrow(SHAPE, CLASSES, width=options.width).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = options.epochs * -(-options.examples // CHUNK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(options.epochs):
        for index in torch.split(torch.randperm(len(x), generator=generator).to(x.device), CHUNK):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return Trained(model.eval(), x, y)


# The suite.


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
    found = Suite()
    for _ in range(options.repetitions):
        with found.one_pass.running():
            subject.loss()
        found.frames = []
        for timer, subset in ((found.whole, None), (found.part, options.subset))[: 2 if options.subset else 1]:
            with timer.running():
                found.frames.append(
                    measure(subject.model, "cross_entropy", (subject.x, subject.y), labels(options, subset))
                )
        run_published(subject, options, found)
    show_suite(found, options)


def run_published(subject: Trained, options: argparse.Namespace, found: Suite) -> None:
    """Run the published procedure, or a fraction of each of its loops, and note the scaled seconds."""
    procedure, wall = Published(subject.model, subject.x, subject.y), 0.0
    for name, part, units in procedure.runs(1.0 if options.full else options.fraction):
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


# The peers.


def peer(name: str) -> Any | None:
    """Return a peer's package, or None after saying that it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"!! {PEERS[name]} is not installed, so nothing is compared with it: pip install {PEERS[name]}")
        return None


def pyhessian_of(package: Any, subject: Trained, *, graph_kept: bool) -> Any:
    """Return PyHessian's object: on one batch with its graph kept, or on batches of a data set."""
    batches = list(zip(torch.split(subject.x, CHUNK), torch.split(subject.y, CHUNK), strict=True))
    data: dict[str, Any] = {"data": (subject.x, subject.y)} if graph_kept else {"dataloader": batches}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph")
        return package.hessian(subject.model, nn.CrossEntropyLoss(), cuda=subject.x.is_cuda, **data)


def curvlinops_of(package: Any, subject: Trained) -> Any:
    """Return curvlinops' linear operator on batches of a data set."""
    batches = list(zip(torch.split(subject.x, CHUNK), torch.split(subject.y, CHUNK), strict=True))
    return package.HessianLinearOperator(
        subject.model, nn.CrossEntropyLoss(), list(subject.model.parameters()), batches, check_deterministic=False
    )


@dataclass(frozen=True)
class Reached:
    """What a contender needs for an error: `seconds` for `products`, and what it found."""

    seconds: float
    products: float
    value: float
    note: str = ""


class Peers:
    """Ours and the peers' measures of one network at equal errors."""

    def __init__(self, subject: Trained, options: argparse.Namespace) -> None:
        self.subject, self.pilot, self.products = subject, options.pilot, options.products
        self.pyhessian, self.curvlinops = peer("pyhessian"), peer("curvlinops")
        self.errors: dict[str, float] = {}

    def measures(self) -> dict[str, dict[str, Callable[[], Reached]]]:
        """Return for each measure what compares; ours is first, for it sets the error."""
        found: dict[str, dict[str, Callable[[], Reached]]] = {
            "hessian_trace": {
                "ours": partial(self.ours, "hessian_trace", f"tolerance={TOLERANCE}, max_samples={self.products}")
            },
            "hessian_frobenius": {
                "ours": partial(self.ours, "hessian_frobenius", f"tolerance={TOLERANCE}, max_samples={self.products}")
            },
            "lambda_max": {"ours": partial(self.ours, "lambda_max", f"tolerance={TOLERANCE}")},
            "hessian_density": {
                "ours": partial(
                    self.ours, "hessian_density", f"share_tolerance={TOLERANCE}, max_samples={2 * self.products}"
                )
            },
        }
        if self.pyhessian is not None:
            found["hessian_trace"]["PyHessian trace"] = self.pyhessian_trace
            found["lambda_max"]["PyHessian eigenvalues"] = self.pyhessian_eigenvalues
            found["hessian_density"]["PyHessian density"] = self.pyhessian_density
        if self.curvlinops is not None:
            found["hessian_trace"]["curvlinops hutchinson_trace"] = partial(self.curvlinops_probes, "hessian_trace")
            found["hessian_trace"]["curvlinops hutchpp_trace"] = self.curvlinops_hutchpp
            found["hessian_frobenius"]["curvlinops hutchinson_squared_fro"] = partial(
                self.curvlinops_probes, "hessian_frobenius"
            )
            found["lambda_max"]["curvlinops, scipy eigsh"] = self.curvlinops_eigsh
            found["hessian_density"]["curvlinops fast_lanczos"] = self.curvlinops_lanczos
        return found

    def ours(self, name: str, argument: str) -> Reached:
        """Measure with ours and set the error that peers must reach."""
        timer, label = Timer(), f"{name}({argument}, metric=identity)"
        with timer.running():
            frame = measure(self.subject.model, "cross_entropy", (self.subject.x, self.subject.y), [label])
        row = frame.iloc[0]
        self.errors[name], self.samples = row["stderr"], int(row["samples"])
        note = f"error {row['stderr']:.2g}" + ("" if row["converged"] else ", not converged")
        return Reached(timer.median(), row["samples"], row["value"], note)

    def pyhessian_trace(self) -> Reached:
        """Return what Hutchinson's method needs at PyHessian's speed."""
        timer, subject = Timer(), pyhessian_of(self.pyhessian, self.subject, graph_kept=False)
        with timer.running(), quiet():
            probes = subject.trace(maxIter=self.pilot, tol=0.0)
        return self._scaled("hessian_trace", probes, timer.median())

    def pyhessian_eigenvalues(self) -> Reached:
        """Return what power iteration needs until two values in a row agree to the tolerance."""
        timer, subject, calls = Timer(), pyhessian_of(self.pyhessian, self.subject, graph_kept=False), [0]
        product = subject.dataloader_hv_product

        def counted(v: Any) -> Any:
            calls[0] += 1
            return product(v)

        subject.dataloader_hv_product = counted
        with timer.running(), quiet():
            values, _ = subject.eigenvalues(maxIter=100, tol=TOLERANCE)
        return Reached(timer.median(), calls[0], values[0], "its tolerance is that of the change in a step")

    def pyhessian_density(self) -> Reached:
        """Return what runs of stochastic Lanczos quadrature need; PyHessian 0.1 calls a function torch has dropped."""
        timer, subject, steps = Timer(), pyhessian_of(self.pyhessian, self.subject, graph_kept=False), LANCZOS_STEPS
        with timer.running(), quiet(), old_eig():
            nodes, weights = subject.density(iter=steps, n_v=RUNS)
        pairs = [(np.array(at), np.array(weight)) for at, weight in zip(nodes, weights, strict=True)]
        return self._density(pairs, timer.median(), "torch.eig lent to it")

    def curvlinops_probes(self, name: str) -> Reached:
        """Return what Hutchinson's method needs at curvlinops' speed for a trace or a Frobenius norm."""
        operator, timer = curvlinops_of(self.curvlinops, self.subject), Timer()
        generator = torch.Generator().manual_seed(1)
        with timer.running():
            g = torch.randint(2, (operator.shape[1], self.pilot), generator=generator).to(operator.device) * 2.0 - 1.0
            product = operator @ g
            probes = (g * product).sum(dim=0) if name == "hessian_trace" else product.square().sum(dim=0)
        return self._scaled(name, probes.tolist(), timer.median())

    def curvlinops_hutchpp(self) -> Reached:
        """Return what runs of Hutch++ need, each with as many products as ours took."""
        operator, timer, each = curvlinops_of(self.curvlinops, self.subject), Timer(), 3 * max(1, self.samples // 3)
        hutchpp = importlib.import_module("curvlinops").hutchpp_trace
        torch.manual_seed(1)
        with timer.running():
            runs = [float(hutchpp(operator, each)) for _ in range(RUNS)]
        return self._scaled("hessian_trace", runs, timer.median(), each)

    def curvlinops_eigsh(self) -> Reached:
        """Return what ARPACK needs to the tolerance."""
        operator, timer, calls = curvlinops_of(self.curvlinops, self.subject).to_scipy(), Timer(), [0]

        def counted(v: Any) -> Any:
            calls[0] += 1
            return operator @ v

        wrapped = LinearOperator(operator.shape, matvec=counted, dtype=operator.dtype)
        start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype)
        with timer.running():
            (value,) = eigsh(wrapped, k=1, which="LA", tol=TOLERANCE, v0=start, return_eigenvectors=False)
        return Reached(timer.median(), calls[0], float(value))

    def curvlinops_lanczos(self) -> Reached:
        """Return what runs of Lanczos without reorthogonalisation need."""
        operator, timer = curvlinops_of(self.curvlinops, self.subject), Timer()
        spectrum = importlib.import_module("curvlinops.papyan2020traces.spectrum")
        torch.manual_seed(1)
        with timer.running():
            found = [spectrum.fast_lanczos(operator, LANCZOS_STEPS) for _ in range(RUNS)]
        pairs = [(at.cpu().numpy(), vectors[0].square().cpu().numpy()) for at, vectors in found]
        return self._density(pairs, timer.median(), "")

    def _scaled(self, name: str, probes: Sequence[float], seconds: float, each: int = 1) -> Reached:
        """Return the cost of as many probes as the error needs, from a pilot's."""
        value, variance = statistics.mean(probes), statistics.variance(probes)
        if name == "hessian_frobenius":
            value = math.sqrt(value)
            variance /= 4 * value**2
        needed = max(1.0, variance / self.errors[name] ** 2)
        spread = math.sqrt(variance / len(probes))
        note = f"pilot of {len(probes)}, error {spread:.2g}"
        return Reached(seconds * needed / len(probes), needed * each, value, note)

    def _density(self, pairs: Sequence[tuple[Any, Any]], seconds: float, note: str) -> Reached:
        """Return the cost of as many products as ours took: a peer's error has a bias that it does not tell."""
        negative = [float((np.clip(-at, 0, None) * weight).sum()) for at, weight in pairs]
        size = [float((np.abs(at) * weight).sum()) for at, weight in pairs]
        share = sum(negative) / sum(size)
        residuals = [(a - share * b) / statistics.mean(size) for a, b in zip(negative, size, strict=True)]
        runs = self.samples / LANCZOS_STEPS
        error = math.sqrt(statistics.variance(residuals) / runs)
        said = f"{LANCZOS_STEPS} steps; error {error:.2g} and an unknown bias" + (f"; {note}" if note else "")
        return Reached(seconds * runs / len(pairs), self.samples, share, said)


LANCZOS_STEPS, RUNS = 16, 4
"""Of a peer's quadrature; ours takes as many steps as its bound on the bias asks for, 8 or more."""


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what a peer prints and warns of."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def old_eig() -> Iterator[None]:
    """Lend torch the `eig` that it had up to 1.12, in the form in which PyHessian 0.1 reads it."""

    def eig(a: Tensor, *, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(a)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    owner: Any = torch
    before = owner.eig
    owner.eig = eig
    try:
        yield
    finally:
        owner.eig = before


def peers(subject: Trained, options: argparse.Namespace) -> None:
    """Compare measures with the peers' and print the figures."""
    contest = Peers(subject, options)
    unit = Timer()
    with unit.running():
        subject.loss()
    columns = ("measure", "who", "value", "products", "seconds", "spread", "passes", "x ours", "note")
    table = Table(*columns, box=box.MARKDOWN, title=f"at equal error, {len(subject.x)} examples, metric identity")
    for name, contenders in contest.measures().items():
        runs: dict[str, list[Reached]] = {who: [] for who in contenders}
        for _ in range(options.repetitions):
            for who, run in contenders.items():
                runs[who].append(run())
        for who, found in runs.items():
            seconds = [one.seconds for one in found]
            ratio = statistics.median(a.seconds / b.seconds for a, b in zip(found, runs["ours"], strict=True))
            median, last = statistics.median(seconds), found[-1]
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            cells = (
                f"{last.value:.4g}",
                f"{last.products:.0f}",
                f"{median:.2f}",
                spread,
                f"{median / unit.median():.0f}",
            )
            table.add_row(name, who, *cells, f"{ratio:.2f}", last.note)
    Console(width=200).print(table)
    print("PyHessian has no Frobenius norm.")


# Hessian-vector products.


def products(subject: Trained, options: argparse.Namespace) -> None:
    """Time a product of every kind in turn with a gradient and print what it costs in gradients."""
    contenders = products_of(subject)
    timers = {name: Timer() for name in contenders}
    for run, _ in contenders.values():
        run()
    for _ in range(options.product_repetitions):
        for name, (run, _) in contenders.items():
            with timers[name].running():
                run()
    table = Table("product", "gradients", "spread", "seconds", box=box.MARKDOWN, title=f"{len(subject.x)} examples")
    gradients = timers["a gradient"].of_device()
    for name, (_, count) in contenders.items():
        ratios = [a / b / count for a, b in zip(timers[name].of_device(), gradients, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(name, f"{statistics.median(ratios):.2f}", spread, f"{timers[name].median() / count:.3f}")
    Console(width=120).print(table)


def products_of(subject: Trained) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return ways to a Hessian-vector product, each with how many of them it makes at once."""
    weights = list(subject.model.parameters())
    generator = torch.Generator().manual_seed(2)
    count = sum(weight.numel() for weight in weights)
    flat = torch.randn(VECTORS, 1, count, generator=generator, dtype=torch.float64).to(subject.x.device)
    parts = torch.split(flat[0, 0].float(), [weight.numel() for weight in weights])
    vector = [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]

    def gradient(*, create_graph: bool = False) -> tuple[Tensor, ...]:
        loss = functional.cross_entropy(subject.model(subject.x), subject.y)
        return torch.autograd.grad(loss, weights, create_graph=create_graph)

    kept, rebuilt = subject.engine(memory=2**34), subject.engine(memory=2**31)
    rebuilt._keeps_graphs = False
    found: dict[str, tuple[Callable[[], Any], int]] = {
        "a gradient": (gradient, 1),
        "ours, graph kept, 1 vector": (lambda: kept.hvps(flat[:1]), 1),
        f"ours, graph kept, {VECTORS} vectors": (lambda: kept.hvps(flat), VECTORS),
        "ours, graph rebuilt, 1 vector": (lambda: rebuilt.hvps(flat[:1]), 1),
        f"ours, graph rebuilt, {VECTORS} vectors": (lambda: rebuilt.hvps(flat), VECTORS),
        "reverse over reverse, graph rebuilt": (
            lambda: torch.autograd.grad(gradient(create_graph=True), weights, vector),
            1,
        ),
    }
    pyhessian, curvlinops = peer("pyhessian"), peer("curvlinops")
    if pyhessian is not None:
        single = pyhessian_of(pyhessian, subject, graph_kept=True)
        product = importlib.import_module("pyhessian.utils").hessian_vector_product
        loader = pyhessian_of(pyhessian, subject, graph_kept=False)

        def from_loader() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loader.dataloader_hv_product(vector)

        found["PyHessian, one batch, graph kept"] = (lambda: product(single.gradsH, single.params, vector), 1)
        found["PyHessian, data loader"] = (from_loader, 1)
    if curvlinops is not None:
        operator, matrix = curvlinops_of(curvlinops, subject), flat[:, 0].float().T.contiguous()
        found["curvlinops H @ v"] = (lambda: operator @ matrix[:, 0], 1)
        found[f"curvlinops H @ V, {VECTORS} columns"] = (lambda: operator @ matrix, VECTORS)
    return found


# The run.


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Cost of sharpness measures, beside the published procedure and peers."
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="width 4, 512 examples (50,000 on a GPU), a subset, effective_dimension: hours on a core, where the "
        "default is width 1 and 64 examples",
    )
    parser.add_argument("--full", action="store_true", help="run all of the published procedure")
    parser.add_argument("--part", choices=("suite", "peers", "products", "all"), default="all")
    parser.add_argument("--width", type=int, help="of the narrow ResNet-18 (default 1; large: 4)")
    parser.add_argument("--examples", type=int, help="training examples (default 64; large: 512, on a GPU 50,000)")
    parser.add_argument("--subset", type=int, help="examples of the subset (default 0: none; large: a quarter)")
    parser.add_argument(
        "--peer-examples", type=int, help="examples in the comparison with peers (default 16; large: 512)"
    )
    parser.add_argument("--epochs", type=int, default=15, help="of training")
    parser.add_argument("--fraction", type=float, default=0.03, help="of the published procedure's loops")
    parser.add_argument("--pilot", type=int, default=8, help="probes from which a peer's variance is taken")
    parser.add_argument("--products", type=int, help="the most that ours may take beside peers, twice for a density")
    parser.add_argument("--repetitions", type=int, help="of the suite and of the peers (default 1; large: 3)")
    parser.add_argument("--product-repetitions", type=int, help="of the products (default 2; large: 5)")
    parser.add_argument("--without", nargs="*", help="measures to leave out of both suites")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.device = torch.device(options.device)
    on_gpu = options.device.type == "cuda"
    options.width = options.width or (4 if options.large else 1)
    options.examples = options.examples or ((50_000 if on_gpu else 512) if options.large else 64)
    if options.subset is None:
        options.subset = max(64, options.examples // 4) if options.large else 0
    options.peer_examples = min(options.examples, options.peer_examples or (512 if options.large else 16))
    options.repetitions = options.repetitions or (3 if options.large else 1)
    options.product_repetitions = options.product_repetitions or (5 if options.large else 2)
    options.products = options.products or (128 if options.large else 32)
    if options.without is None:
        options.without = [] if options.large else ["effective_dimension"]
    return options


def main() -> None:
    """Train, compare, print."""
    options = read_options()
    torch.set_num_threads(options.threads)
    subject = trained(options)
    weights = sum(parameter.numel() for parameter in subject.model.parameters())
    with torch.no_grad():
        right = torch.cat([subject.model(x).argmax(dim=1) for x in torch.split(subject.x, BATCH)]) == subject.y
    device = torch.cuda.get_device_name() if options.device.type == "cuda" else f"{options.threads} thread(s)"
    print(
        f"resnet18_narrow, width {options.width}, {weights} weights, {options.examples} examples, training loss "
        f"{subject.loss():.4f}, accuracy {float(right.float().mean()):.3f}; repetitions: {options.repetitions}, "
        f"of products {options.product_repetitions}"
    )
    if options.part in ("products", "all"):
        products(subject.first(CHUNK), options)
    if options.part in ("peers", "all"):
        peers(subject.first(options.peer_examples), options)
    if options.part in ("suite", "all"):
        suite(subject, options)
    names = ("torch", "flatmin-sweep", *(name for name in PEERS.values() if installed(name)))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    machine = f"{platform.machine()} {platform.system()}, {device}, Python {platform.python_version()}"
    print(f"{machine}, {versions}, commit {commit()}")


def installed(name: str) -> bool:
    """Return whether a distribution is there."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def commit() -> str:
    """Return the commit of this checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
