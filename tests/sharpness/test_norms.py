"""Norms and margins that a correlation study controls for, against loops and dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from flatmin.errors import FlatminError, RequestError
from flatmin.plugins import get
from flatmin.sharpness import Engine, measure
from flatmin.sharpness.distance_from_initialisation import distance_from_initialisation
from flatmin.sharpness.l2_norm import l2_norm
from flatmin.sharpness.margin import margin
from flatmin.sharpness.path_norm import path_norm
from flatmin.sharpness.spectral_norms import spectral_norms
from flatmin.stack import Batch, StackedNetwork

NORMS = ["l2_norm", "distance_from_initialisation", "path_norm", "spectral_norms"]


def engine_of(*modules: nn.Module, shape: tuple[int, ...] = (4,), classes: int = 3, **options: Any) -> Engine:
    """Return an engine of some networks, in float64, on ten examples."""
    for module in modules:
        module.double().eval()
    params, buffers = StackedNetwork.stack(modules)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, *shape, dtype=torch.float64, generator=generator)
    y = torch.randint(classes, (len(modules), 10), generator=generator)
    keys = torch.arange(len(modules))
    return Engine(StackedNetwork(modules[0]), params, buffers, [Batch(x, y, shared=True)], keys, **options)


def seeded(build: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: nn.Module = build()
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
                part.running_mean.normal_()
                assert part.running_var is not None
                part.running_var.uniform_(0.2, 2.0)
    return module.double().eval()


def affine(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return A and c of an affine layer on one input of a shape, A x + c, and its output's shape."""
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    dense: Tensor = jacobian(layer, zero)  # type: ignore[no-untyped-call]
    out = layer(zero).detach()
    return dense.reshape(out.numel(), zero.numel()), out.flatten(), tuple(out.shape[1:])


@pytest.mark.parametrize("name", ["l2", "distance"])
def test_norms_of_weights_by_loops(problem: Any, name: str) -> None:
    made = problem.engine()
    start = made.params * 0.5 + 0.1
    engine = Engine(made.network, made.params, made.buffers, made.batches, made.keys, initial=start)
    estimate = l2_norm(engine) if name == "l2" else distance_from_initialisation(engine)
    for k, module in enumerate(problem.modules):
        flat = [w for parameter in module.parameters() for w in parameter.flatten().tolist()]
        moved = [w - (0.0 if name == "l2" else 0.5 * w + 0.1) for w in flat]
        assert estimate.value[k].item() == pytest.approx(math.sqrt(math.fsum(m * m for m in moved)), rel=1e-12)
    assert estimate.passes.tolist() == estimate.stderr.tolist() == [0.0] * len(engine)


def test_distance_needs_the_initial_weights(mlp: Any) -> None:
    with pytest.raises(FlatminError, match="initial weights are needed"):
        distance_from_initialisation(mlp.engine())


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("argument", ["data=test", "subset=100", "loss=squared_error", "label_smoothing=0.1"])
def test_norms_of_weights_take_no_examples(name: str, argument: str) -> None:
    with pytest.raises(RequestError, match=rf"{name} does not take '{argument.split('=')[0]}': it is a norm"):
        measure(nn.Linear(2, 2), "cross_entropy", (torch.randn(3, 2), torch.zeros(3).long()), [f"{name}({argument})"])


def test_the_path_norm_of_a_perceptron_is_a_sum_over_paths(mlp: Any) -> None:
    value = path_norm(mlp.engine()).value
    for k, module in enumerate(mlp.modules):
        (w, b), (v, c) = ((layer.weight.tolist(), layer.bias.tolist()) for layer in (module[0], module[2]))
        paths = [w[h][i] * v[o][h] for i, h, o in product(range(4), range(5), range(3))]
        paths += [b[h] * v[o][h] for h, o in product(range(5), range(3))] + c
        assert value[k].item() == pytest.approx(math.sqrt(math.fsum(path**2 for path in paths)), rel=1e-12)


def test_the_path_norm_takes_batchnorm_as_the_affine_map_it_is(conv: Any) -> None:
    """Dense matrices of every layer, squared one by one and multiplied."""
    value = path_norm(conv.engine()).value
    for k, module in enumerate(conv.modules):
        at, shape = torch.ones(25, dtype=torch.float64), tuple([1, 5, 5])
        for layer in module:
            if not isinstance(layer, nn.ReLU):
                a, c, shape = affine(layer, shape)
                at = a.square() @ at + c.square()
        assert value[k].item() == pytest.approx(at.sum().sqrt().item(), rel=1e-12)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False)], ids=["affine", "plain"])
def test_the_path_norm_of_either_batchnorm(norm: nn.Module) -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 5, bias=False), norm, nn.ReLU(), nn.Linear(5, 3)))
    at, shape = torch.ones(4, dtype=torch.float64), tuple([4])
    for layer in (module[0], module[1], module[3]):  # type: ignore[index]
        a, c, shape = affine(layer, shape)
        at = a.square() @ at + c.square()
    assert path_norm(engine_of(module)).value.item() == pytest.approx(at.sum().sqrt().item(), rel=1e-9)


def test_the_path_norm_is_that_of_the_function(mlp: Any) -> None:
    """A ReLU unit's inputs times ten and its outputs by ten leave it alone, and the norm of the weights not."""
    before, module = mlp.engine(), mlp.modules[1]
    path, norm = path_norm(before).value[1].item(), l2_norm(before).value[1].item()
    with torch.no_grad():
        module[0].weight[2] *= 10
        module[0].bias[2] *= 10
        module[2].weight[:, 2] /= 10
    assert path_norm(mlp.engine()).value[1].item() == pytest.approx(path, rel=1e-12)
    assert l2_norm(mlp.engine()).value[1].item() > 1.5 * norm


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)) + x)
        return y


def test_the_path_norm_counts_skip_connections() -> None:
    module = seeded(Skipping)
    w, b, v, c = (parameter.detach().square() for parameter in module.parameters())
    expected = (v @ (w.sum(dim=1) + b + 1.0) + c).sum().sqrt().item()
    assert path_norm(engine_of(module)).value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_norms_of_the_narrow_resnet(batch_norm: bool, skip: bool) -> None:
    build = get("network", "resnet18_narrow").load()
    module = seeded(lambda: build((1, 8, 8), 3, width=1, batch_norm=batch_norm, skip=skip))
    engine = engine_of(module, shape=(1, 8, 8))
    for found in (path_norm(engine), spectral_norms(engine), spectral_norms(engine, operator="reshaped")):
        assert bool(found.converged.all())


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.LayerNorm(5), nn.Softmax(dim=1), nn.GELU()], ids=repr)
def test_what_is_not_homogeneous_has_no_path_norm(layer: nn.Module) -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)))
    with pytest.raises(FlatminError, match="not homogeneous"):
        path_norm(engine_of(module))


class Forward(nn.Module):
    """One linear layer of a given size before what a function makes of it, and one of three outputs behind."""

    def __init__(self, function: Callable[[Tensor], Tensor], hidden: int, rest: int) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(4, hidden), nn.Linear(rest, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.length, self.direction = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.length * nn.functional.normalize(self.direction))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)),
        nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2)), nn.InstanceNorm1d(3), nn.Flatten(), nn.Linear(6, 3)),
        nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2)), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(6, 3)),
        Forward(lambda h: h + nn.functional.layer_norm(h, (5,)), 5, 5),
        Forward(lambda h: h * h.softmax(dim=1), 5, 5),
        Forward(nn.functional.elu, 5, 5),
        Forward(nn.functional.relu6, 5, 5),
        Forward(lambda h: h[:, :3] * h[:, 3:], 6, 3),
    ],
    ids=["first", "instance", "group", "residual", "gate", "elu", "clipped", "product"],
)
def test_what_looks_homogeneous_on_ones_has_no_path_norm(module: nn.Module) -> None:
    """Normalising a constant gives 0, and a squared network has no negative number."""
    with pytest.raises(RequestError, match="not homogeneous"):
        path_norm(engine_of(seeded(lambda: module)))


@pytest.mark.parametrize(
    "module",
    [
        Forward(lambda h: h[:, :3] - h[:, 3:], 6, 3),
        Forward(lambda h: torch.relu(h[:, :3] - 0.1 * h[:, 3:]), 6, 3),
        Forward(lambda h: -3.0 * h, 5, 5),
        Normed(),
    ],
    ids=["difference", "rectified", "negative", "normed"],
)
def test_paths_that_count_negatively_cannot_be_summed(module: nn.Module) -> None:
    with pytest.raises(RequestError, match="falls where one of them rises"):
        path_norm(engine_of(seeded(lambda: module)))


@pytest.mark.parametrize(
    "layer", [nn.LeakyReLU(0.1), nn.PReLU(), nn.MaxPool1d(1), nn.Dropout(), nn.Identity()], ids=repr
)
def test_what_passes_positive_numbers_on_changes_no_path(layer: nn.Module) -> None:
    first, last = nn.Linear(4, 5), nn.Linear(5, 3)
    module, plain = nn.Sequential(first, layer, last), nn.Sequential(first, last)
    assert path_norm(engine_of(module)).value.item() == pytest.approx(path_norm(engine_of(plain)).value.item())


def kinds() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "strided": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 7, 6)),
        "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
        "circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
        "dilated": (nn.Conv1d(2, 4, 3, dilation=2), (2, 20)),
        "transposed": (nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 5, 4)),
        "one number": (nn.Conv1d(1, 4, 3, padding=1), (1, 1)),
    }


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("tolerance", [1e-8, 0.05])
def test_a_convolutions_norm_is_that_of_its_dense_matrix(kind: str, tolerance: float) -> None:
    layer, shape = kinds()[kind]
    dense, _, out = affine(layer.double(), shape)
    expected = torch.linalg.matrix_norm(dense, ord=2).log().item()
    flat = nn.Linear(math.prod(out), 3, bias=False)
    engine = engine_of(nn.Sequential(layer, nn.Flatten(), flat), shape=shape)
    found = spectral_norms(engine, tolerance=tolerance)
    last = math.log(np.linalg.norm(flat.weight.detach().numpy(), 2))
    assert found.converged.item()
    assert found.stderr.item() <= tolerance
    assert abs(found.value.item() - expected - last) <= found.stderr.item() + 1e-12


def test_spectral_norms_of_a_stack(conv: Any) -> None:
    exact, reshaped = spectral_norms(conv.engine(), tolerance=1e-9), spectral_norms(conv.engine(), operator="reshaped")
    for k, module in enumerate(conv.modules):
        shapes = {0: (1, 5, 5), 3: (3, 3, 3), 6: (8,)}
        dense = [affine(module[place], shape)[0] for place, shape in shapes.items()]
        expected = sum(math.log(np.linalg.norm(matrix.numpy(), 2)) for matrix in dense)
        assert exact.value[k].item() == pytest.approx(expected, abs=1e-8)
        kernels = [module[place].weight.detach().flatten(1).numpy() for place in shapes]
        expected = sum(math.log(np.linalg.norm(matrix, 2)) for matrix in kernels)
        assert reshaped.value[k].item() == pytest.approx(expected, rel=1e-12)
    assert reshaped.samples.tolist() == [3, 3]
    assert bool((exact.samples > 3).all())


@pytest.mark.parametrize("operator", ["convolution", "reshaped"])
@pytest.mark.parametrize("weight", [0.0, math.nan])
def test_a_dead_or_broken_layer_has_no_logarithm(conv: Any, operator: Any, weight: float) -> None:
    made = conv.engine()
    params = made.params.clone()
    params[1, : made.network.sizes[0]] = weight
    found = spectral_norms(Engine(made.network, params, made.buffers, made.batches, made.keys), operator=operator)
    assert found.value.isnan().tolist() == [False, True]
    assert found.converged.tolist() == [True, False]
    assert found.value[0] == spectral_norms(made, operator=operator).value[0]


def test_a_matrix_of_another_layer_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(4, 4))
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(x @ self.matrix)
            return y

    with pytest.raises(FlatminError, match="'matrix' of a Own is a matrix"):
        spectral_norms(engine_of(Own()))


def test_a_network_without_matrices_has_no_spectral_norm() -> None:
    with pytest.raises(FlatminError, match="no linear or convolutional layer"):
        spectral_norms(engine_of(nn.BatchNorm1d(3), shape=(3,)))


@pytest.mark.parametrize("percentile", [0.0, 10.0, 50.0, 99.0, 100.0])
def test_the_margin_is_a_percentile(problem: Any, percentile: float) -> None:
    engine = problem.engine((6,))
    found, inverse = (margin(engine, percentile=percentile, inverse_squared=flag) for flag in (False, True))
    for k, module in enumerate(problem.modules):
        margins = []
        for outputs, target in zip(module(problem.x).tolist(), problem.y[k].tolist(), strict=True):
            margins.append(outputs[target] - max(out for c, out in enumerate(outputs) if c != target))
        expected = np.percentile(margins, percentile)
        assert found.value[k].item() == pytest.approx(expected, rel=1e-12)
        if expected > 0:
            assert inverse.value[k].item() == pytest.approx(1 / expected**2, rel=1e-12)
        else:
            assert inverse.value[k].isnan().item()
            assert not inverse.converged[k].item()
    assert found.passes.tolist() == [1.0] * len(engine)
    assert bool(found.converged.all())


def test_a_margin_needs_classes() -> None:
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    with pytest.raises(FlatminError, match="a margin needs"):
        measure(nn.Linear(2, 3), "squared_error", (x, y), ["margin"])
    with pytest.raises(FlatminError, match="a margin needs"):
        measure(nn.Linear(2, 1), nn.MSELoss(), (x, y[:, :1]), ["margin"])
