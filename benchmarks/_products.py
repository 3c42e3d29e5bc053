"""Hessian-vector products in units of a gradient, ours and the peers': a part of `sharpness.py`."""

from __future__ import annotations

import argparse
import importlib
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _peers import curvlinops_of, peer, pyhessian_of
from _trained import Timer, Trained
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional

VECTORS = 8


def products(subject: Trained, options: argparse.Namespace) -> Table:
    """Time a product of every kind in turn with a gradient and return what it costs in gradients."""
    contenders = products_of(subject)
    timers = {name: Timer() for name in contenders}
    for run, _ in contenders.values():
        run()
    for _ in range(options.product_repetitions):
        for name, (run, _) in contenders.items():
            with timers[name].running():
                run()
    title = f"A Hessian-vector product in gradients: {len(subject.x)} examples, width {options.width}"
    table = Table("product", "gradients", "spread", "seconds", box=box.MARKDOWN, title=title)
    gradients = timers["a gradient"].of_device()
    for name, (_, count) in contenders.items():
        ratios = [a / b / count for a, b in zip(timers[name].of_device(), gradients, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(name, f"{statistics.median(ratios):.2f}", spread, f"{timers[name].median() / count:.3f}")
    return table


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
