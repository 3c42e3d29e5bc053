"""Measures of the Hessian beside PyHessian's and curvlinops' at equal error: a part of `sharpness.py`."""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any

import numpy as np
import torch
from _trained import CHUNK, TOLERANCE, Timer, Trained
from rich import box
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from flatmin.sharpness import measure
from flatmin.sharpness.engine import PRODUCT_PASSES

PEERS = {"pyhessian": "PyHessian", "curvlinops": "curvlinops-for-pytorch"}


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
            found["lambda_max"]["PyHessian eigenvalues, to our bound"] = self.pyhessian_eigenvalues_to_bound
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
        self.errors[name], self.products_made = row["stderr"], round(row["passes"] / PRODUCT_PASSES)
        note = f"error {row['stderr']:.2g}" + ("" if row["converged"] else ", not converged")
        return Reached(timer.median(), self.products_made, row["value"], note)

    def pyhessian_trace(self) -> Reached:
        """Return what Hutchinson's method needs at PyHessian's speed."""
        timer, subject = Timer(), pyhessian_of(self.pyhessian, self.subject, graph_kept=False)
        with timer.running(), quiet():
            probes = subject.trace(maxIter=self.pilot, tol=0.0)
        return self._scaled("hessian_trace", probes, timer.median())

    def pyhessian_eigenvalues(self) -> Reached:
        """Return what power iteration needs until two values in a row agree to the tolerance: no bound on an error."""
        seconds, steps = self._power_iteration(TOLERANCE)
        value, residual = steps[-1]
        return Reached(seconds, len(steps), value, f"its own rule; residual bound {residual:.2g}")

    def pyhessian_eigenvalues_to_bound(self) -> Reached:
        """Return what power iteration needs until its residual, worked out for nothing, bounds the error as ours."""
        seconds, steps = self._power_iteration(1e-5)
        allowed = self.errors["lambda_max"]
        above = [n for n, (_, residual) in enumerate(steps, 1) if residual > allowed]
        needed = min(len(steps), 1 + max(above, default=0))  # a random vector may have a small residual too, near zero
        value, residual = steps[needed - 1]
        return Reached(seconds * needed / len(steps), needed, value, f"residual bound {residual:.2g}")

    def _power_iteration(self, tolerance: float) -> tuple[float, list[tuple[float, float]]]:
        """Run PyHessian's and return its seconds, and for each product its value and residual."""
        timer, subject = Timer(), pyhessian_of(self.pyhessian, self.subject, graph_kept=False)
        product, found = subject.dataloader_hv_product, []

        def noted(v: Any) -> Any:
            value, result = product(v)
            found.append((v, value, result))
            return value, result

        subject.dataloader_hv_product = noted
        with timer.running(), quiet():
            subject.eigenvalues(maxIter=100, tol=tolerance)
        residuals = [
            math.sqrt(sum(float((b - value * a).square().sum()) for a, b in zip(v, result, strict=True)))
            for v, value, result in found
        ]
        return timer.median(), [(value, residual) for (_, value, _), residual in zip(found, residuals, strict=True)]

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
        operator, timer = curvlinops_of(self.curvlinops, self.subject), Timer()
        each = 3 * max(1, self.products_made // 3)
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
        runs = self.products_made / LANCZOS_STEPS
        error = math.sqrt(statistics.variance(residuals) / runs)
        said = f"{LANCZOS_STEPS} steps; error {error:.2g} and an unknown bias" + (f"; {note}" if note else "")
        return Reached(seconds * runs / len(pairs), self.products_made, share, said)


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


def peers(subject: Trained, options: argparse.Namespace) -> Table:
    """Compare measures with the peers' and return the figures."""
    contest = Peers(subject, options)
    unit = Timer()
    with unit.running():
        subject.loss()
    columns = ("measure", "who", "value", "products", "seconds", "spread", "passes", "x ours", "note")
    size = f"{len(subject.x)} examples, width {options.width}"
    table = Table(*columns, box=box.MARKDOWN, title=f"Measures at equal error: {size}, metric identity")
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
    return table
