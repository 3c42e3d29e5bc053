"""Measures of the Hessian against curvlinops and PyHessian, which compute them in ways of their own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin.sharpness.effective_dimension import effective_dimension
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.fisher_rao import fisher_rao
from flatmin.sharpness.hessian_density import hessian_density
from flatmin.sharpness.hessian_frobenius import hessian_frobenius
from flatmin.sharpness.hessian_trace import hessian_trace
from flatmin.sharpness.lambda_max import lambda_max

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch.jit.script, as opt_einsum uses it
    curvlinops = pytest.importorskip("curvlinops")
pyhessian = pytest.importorskip("pyhessian")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph=True:UserWarning"),
]


def linear_operator(kind: str, problem: Any) -> Any:
    module = problem.modules[0].eval()
    loss = nn.CrossEntropyLoss()
    return getattr(curvlinops, kind)(module, loss, list(module.parameters()), [(problem.x, problem.y[0])])


def dense(kind: str, problem: Any) -> Tensor:
    operator = linear_operator(kind, problem)
    result: Tensor = (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).detach()
    return result


def test_against_curvlinops(problem: Any) -> None:
    engine = problem.engine((6,)).select(torch.tensor([0]))
    hessian = dense("HessianLinearOperator", problem)
    eigenvalues = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
    found = {
        "trace": (hessian_trace(engine, metric="identity"), hessian.trace()),
        "norm": (hessian_frobenius(engine, metric="identity"), hessian.norm()),
        "top": (lambda_max(engine, metric="identity", tolerance=1e-9), eigenvalues[-1]),
        "dimension": (effective_dimension(engine, metric="identity"), (eigenvalues / (eigenvalues.abs() + 1)).sum()),
        "share": (
            hessian_density(engine, metric="identity"),
            -eigenvalues.clamp(max=0).sum() / eigenvalues.abs().sum(),
        ),
    }
    for name, (estimate, truth) in found.items():
        assert estimate.value.item() == pytest.approx(truth.item(), rel=1e-8), name


@pytest.mark.parametrize(("fisher", "kind"), [("true", "GGNLinearOperator"), ("empirical", "EFLinearOperator")])
def test_fisher_rao_against_curvlinops(problem: Any, fisher: Any, kind: str) -> None:
    engine: Engine = problem.engine((6,))
    w = engine.params[0]
    truth = w @ dense(kind, problem) @ w
    assert fisher_rao(engine, fisher=fisher).value[0].item() == pytest.approx(truth.item(), rel=1e-8)


def test_against_pyhessian(problem: Any) -> None:
    engine = problem.engine((6,)).select(torch.tensor([0]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, batch = problem.modules[0].eval(), (problem.x, problem.y[0])
        peer = pyhessian.hessian(module, nn.CrossEntropyLoss(), data=batch, cuda=False)
        top = peer.eigenvalues(maxIter=2000, tol=1e-10)[0][0]
        trace = torch.tensor(peer.trace(maxIter=400, tol=0.0))
    for parameter in module.parameters():
        parameter.grad = None
    ours = lambda_max(engine, metric="identity", tolerance=1e-9).value.item()
    assert top == pytest.approx(ours, rel=1e-5)
    error = trace.std().item() / 20
    assert abs(trace.mean().item() - hessian_trace(engine, metric="identity").value.item()) < 4 * error
