"""Small problems in float64, and their gradients and Hessians by slow, independent code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call, grad

from flatmin.sharpness import Engine, Estimate
from flatmin.stack import Batch, StackedNetwork

CLASSES = 3
METRICS = ["identity", "filter", "element"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Problem:
    """K modules of one network, their examples, and one random stream each."""

    modules: Sequence[nn.Module]
    x: Tensor
    y: Tensor
    keys: Tensor

    def engine(self, cuts: Sequence[int] = (), memory: int = 2**31) -> Engine:
        """Return an engine whose batches end at `cuts` and at the last example."""
        params, buffers = StackedNetwork.stack(self.modules)
        edges = [0, *cuts, self.y.shape[1]]
        batches = [Batch(self.x[start:stop], self.y[:, start:stop], shared=True) for start, stop in pairwise(edges)]
        return Engine(StackedNetwork(self.modules[0]), params, buffers, batches, self.keys, memory=memory)

    def loss_of(self, k: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Return the loss of model k as a function of its flat weights, and those weights."""
        module = self.modules[k].eval()
        names = [name for name, _ in module.named_parameters()]
        shapes = [parameter.shape for parameter in module.parameters()]

        def loss(flat: Tensor) -> Tensor:
            pieces = torch.split(flat, [shape.numel() for shape in shapes])
            own = {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
            return nn.functional.cross_entropy(functional_call(module, own, (self.x,)), self.y[k])

        return loss, nn.utils.parameters_to_vector(module.parameters()).detach()

    def gradient(self, k: int) -> Tensor:
        """Return the gradient `[d]` of model k."""
        loss, flat = self.loss_of(k)
        result: Tensor = grad(loss)(flat)
        return result

    def hessian(self, k: int) -> Tensor:
        """Return the dense Hessian `[d, d]` of model k."""
        loss, flat = self.loss_of(k)
        result: Tensor = hessian(loss, flat)  # type: ignore[no-untyped-call]
        return result


def _problem(build: Callable[[], nn.Module], shape: Sequence[int], models: int, examples: int) -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        modules = [build().double().eval() for _ in range(models)]
        x = torch.randn(examples, *shape, dtype=torch.float64)
        y = torch.randint(CLASSES, (models, examples))
        for module in modules:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(0.5 + torch.rand_like(buffer))
    return Problem(modules, x, y, torch.arange(models) + 100)


def engine_of(modules: list[nn.Module], x: Tensor, y: Tensor, **options: Any) -> Engine:
    params, buffers = StackedNetwork.stack(modules)
    batch = Batch(x, y.expand(len(modules), *y.shape), shared=True)
    return Engine(StackedNetwork(modules[0]), params, buffers, [batch], torch.arange(len(modules)), **options)


def near_a_minimum(module: nn.Module, x: Tensor, y: Tensor) -> None:
    """Train a network until its gradient nearly vanishes, with a penalty on its weights."""
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        flat = nn.utils.parameters_to_vector(module.parameters())
        loss = nn.functional.cross_entropy(module(x), y) + 0.003 * flat.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def perceptron(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, CLASSES))


def convolutional() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        norm,
        nn.ReLU(),
        nn.Conv2d(3, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * 2 * 2, CLASSES),
    )


@pytest.fixture
def mlp() -> Problem:
    """Four ReLU networks of 43 weights with one hidden layer, 23 examples."""
    return _problem(perceptron, (4,), 4, 23)


@pytest.fixture
def conv() -> Problem:
    """Two convolutional networks with BatchNorm in eval mode, 17 examples."""
    return _problem(convolutional, (1, 5, 5), 2, 17)


@pytest.fixture(params=["mlp", "conv"])
def problem(request: pytest.FixtureRequest) -> Problem:
    """Either of the two."""
    result: Problem = request.getfixturevalue(request.param)
    return result


@pytest.fixture
def repeated() -> Callable[[int], Problem]:
    """Return a maker of n copies of one smooth model near a minimum, which differ in their streams alone."""

    def make(copies: int) -> Problem:
        one = _problem(lambda: perceptron(nn.Tanh), (4,), 1, 23)
        module = one.modules[0]
        near_a_minimum(module, one.x, one.y[0])
        return Problem([module] * copies, one.x, one.y.expand(copies, -1), torch.arange(copies))

    return make


@pytest.fixture
def coverage() -> Callable[[Estimate, float], float]:
    """Return how often the 95 % interval (Student's, at the mean sample size) of an estimate holds the truth."""

    def share(estimate: Estimate, truth: float) -> float:
        quantile = student.ppf(0.975, estimate.samples.double().mean().item() - 1)
        inside = (estimate.value - truth).abs() <= float(quantile) * estimate.stderr
        return float(inside.double().mean())

    return share


@pytest.fixture
def with_spectrum() -> Callable[..., Engine]:
    """Return a maker of engines whose Hessian has given eigenvalues, and eigenvectors at random."""

    def make(eigenvalues: Tensor, copies: int, memory: int = 2**31) -> Engine:
        d = len(eigenvalues)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            vectors = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
            module = nn.Linear(d, 1, bias=False).double()
        params, _ = StackedNetwork.stack([module] * copies)
        batch = Batch(d**0.5 * vectors.T, eigenvalues.double().expand(copies, -1), shared=True)

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return 0.5 * targets * outputs[:, 0].square()

        keys = torch.arange(copies) + 7
        return Engine(StackedNetwork(module), params, {}, [batch], keys, loss=loss, memory=memory)

    return make
