"""What follows the gradient: sam_sharpness, worst_sharpness, gradient_norm and local_entropy_gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from tests.sharpness.conftest import METRICS, engine_of
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.labels import parse_label
from flatmin.sharpness import Engine
from flatmin.sharpness.gradient_norm import gradient_norm
from flatmin.sharpness.local_entropy_gradient import local_entropy_gradient
from flatmin.sharpness.losses import squared_error
from flatmin.sharpness.sam_sharpness import sam_sharpness
from flatmin.sharpness.worst_sharpness import worst_sharpness


def with_weights(problem: Any, params: Tensor) -> Engine:
    whole = problem.engine()
    return Engine(whole.network, params, whole.buffers, whole.batches, problem.keys)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_ones_against_the_gradient(problem: Any, metric: Any) -> None:
    engine = problem.engine((6,))
    norm = gradient_norm(engine, metric=metric)
    first = sam_sharpness(engine, kind="first_order", radius=2.0, metric=metric)
    ascent = sam_sharpness(engine, radius=0.3, metric=metric)
    for k in range(len(engine)):
        loss, flat = problem.loss_of(k)
        d = engine.scale(metric)[k]
        g = d * problem.gradient(k)
        there = loss(flat + 0.3 * d * g / g.norm()) - loss(flat)
        assert norm.value[k].item() == pytest.approx(g.norm().item(), rel=1e-9)
        assert first.value[k].item() == pytest.approx(2.0 * g.norm().item(), rel=1e-9)
        assert ascent.value[k].item() == pytest.approx(there.item(), rel=1e-9)
    for estimate, passes in ((norm, 2.0), (first, 2.0), (ascent, 3.0)):
        assert estimate.stderr.tolist() == [0.0] * len(engine)
        assert estimate.passes.tolist() == [passes] * len(engine)
        assert bool(estimate.converged.all())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("radius", [0.01, 0.3, 2.0])
def test_true_is_never_below_ascent(problem: Any, metric: Any, radius: float) -> None:
    ascent = sam_sharpness(problem.engine(), radius=radius, metric=metric)
    true = sam_sharpness(problem.engine(), kind="true", radius=radius, metric=metric)
    assert bool((true.value >= ascent.value).all())
    assert bool((true.value > ascent.value).any())
    assert true.passes.tolist() == [2.0 + 20 * 2 + 1] * len(true.value)
    assert torch.equal(true.converged, true.stderr <= 0.02 * true.value)


def quadratic() -> tuple[Engine, Tensor, Tensor]:
    """Return three linear models under the squared error, and their gradients and Hessians in closed form."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        modules: list[nn.Module] = [nn.Linear(4, 2).double() for _ in range(3)]
        x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    engine = engine_of(modules, x, y, loss=squared_error)
    one = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], dim=1)
    # Weights are [2, 4] row by row, then the two biases; the loss is the mean of 2 squares per example.
    order = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 4, 9])
    hessian = torch.kron(torch.eye(2, dtype=torch.float64), one.T @ one / 20)[order][:, order]
    gradients = torch.stack([((module(x) - y).T @ one / 20).flatten()[order] for module in modules]).detach()
    return engine, gradients, hessian


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("radius", [0.05, 1.0])
def test_the_highest_point_of_a_quadratic(metric: Any, radius: float) -> None:
    """In the basis of D A D the maximum over a sphere solves (lambda - A) u = g, lambda above all eigenvalues."""
    engine, gradients, hessian = quadratic()
    options: dict[str, Any] = {"radius": radius, "metric": metric, "steps": 200}
    found = [
        sam_sharpness(engine, kind="true", **options),
        worst_sharpness(engine, norm="l2", batch=None, restarts=3, **options),
    ]
    for k in range(3):
        d = engine.scale(metric)[k]
        values, basis = torch.linalg.eigh(d[:, None] * hessian * d)
        g = basis.T @ (d * gradients[k])

        def excess(multiplier: float, *, g: Tensor = g, values: Tensor = values) -> float:
            return float((g / (multiplier - values)).norm()) - radius

        top = values[-1].item()
        multiplier = brentq(excess, top + 1e-9, top + 10 + 2 * g.norm().item() / radius, xtol=1e-14)
        u = g / (multiplier - values)
        maximum = (g @ u + 0.5 * (values * u.square()).sum()).item()
        for estimate in found:
            assert bool(estimate.converged[k])
            assert estimate.value[k].item() == pytest.approx(maximum, rel=1e-6)
            assert estimate.value[k].item() <= maximum * (1 + 1e-9)


@pytest.mark.parametrize("metric", ["identity", "element"])
@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_the_highest_point_of_linear_logits(metric: Any, norm: Any, dual: int) -> None:
    """With one example and two classes the margin falls by rho times the dual norm of its gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        module = nn.Linear(5, 2).double()
        x = torch.randn(1, 5, dtype=torch.float64)
    engine = engine_of([module], x, torch.tensor([0]))
    estimate = worst_sharpness(engine, radius=0.3, norm=norm, metric=metric)
    margin_gradient = torch.cat([x[0], -x[0], torch.tensor([1.0, -1.0], dtype=torch.float64)])
    fall = 0.3 * torch.linalg.vector_norm(engine.scale(metric)[0] * margin_gradient, dual).item()
    logits = module(x)[0]
    margin = (logits[0] - logits[1]).item()
    maximum = math.log1p(math.exp(fall - margin)) - math.log1p(math.exp(-margin))
    assert estimate.value.item() == pytest.approx(maximum, rel=1e-9)
    assert estimate.converged.item()
    assert estimate.samples.item() == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_climb_beats_random_points(problem: Any, norm: Any) -> None:
    engine, radius = problem.engine(), 0.1
    estimate = worst_sharpness(engine, radius=radius, norm=norm, metric="filter", batch=None)
    z = engine.vectors("normal", "points", 0, 300)
    on_the_edge = z.sign() if norm == "linf" else z / z.norm(dim=2, keepdim=True)
    others = engine.losses_at(radius * engine.scale("filter") * on_the_edge) - engine.losses()
    assert bool((estimate.value > others.amax(dim=0)).all())


def test_more_climbs_find_no_less(problem: Any) -> None:
    one, more = (
        worst_sharpness(problem.engine(), radius=1.0, norm="l2", metric="filter", batch=None, restarts=restarts)
        for restarts in (1, 4)
    )
    assert bool((more.value >= one.value).all())
    assert bool((more.value > one.value).any())
    assert more.passes.tolist() == [2.0 + 4 * 41] * len(more.value)


def test_a_climb_that_has_not_come_to_rest_says_so(mlp: Any) -> None:
    short = sam_sharpness(mlp.engine(), kind="true", radius=2.0, steps=3, tolerance=1e-4)
    long = sam_sharpness(mlp.engine(), kind="true", radius=2.0, steps=300, tolerance=1e-4)
    assert not bool(short.converged.any())
    assert bool((short.stderr > 1e-4 * short.value).all())
    assert bool(long.converged.all())
    assert bool((long.value > short.value).all())


class Saddle(nn.Module):
    """A loss of log(1 + exp(-2 a^2 + b^2 / 2)), whose gradient vanishes at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.weight[0], self.weight[1]
        return torch.stack([x[:, 0] + 2 * a**2 - b**2 / 2, torch.zeros_like(x[:, 0])], dim=1)


def test_a_gradient_of_zero() -> None:
    engine = engine_of([Saddle()], torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0]))
    for kind in ("ascent", "true"):
        undefined = sam_sharpness(engine, kind=kind)
        assert undefined.value.isnan().item()
        assert undefined.stderr.isnan().item()
        assert not undefined.converged.item()
    assert sam_sharpness(engine, kind="first_order").value.item() == 0.0
    assert gradient_norm(engine).value.item() == 0.0
    worst = worst_sharpness(engine, radius=0.5, norm="l2", metric="identity", steps=100)
    maximum = math.log1p(math.exp(0.125)) - math.log(2)
    assert 0.98 * maximum < worst.value.item() <= maximum, "from a random point, in a zigzag"


class Peak(nn.Module):
    """A loss of log(1 + exp(-2 (a - 0.1)^2)), highest at a = 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x + 2 * (self.weight - 0.1) ** 2, torch.zeros_like(x)], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_are_halved_until_a_peak_inside_the_ball_is_met(norm: Any) -> None:
    engine = engine_of([Peak()], torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0]))
    estimate = worst_sharpness(engine, radius=1.0, norm=norm, metric="identity", steps=50)
    maximum = math.log(2) - math.log1p(math.exp(-2 * 0.4**2))
    assert (1 - 1e-3) * maximum < estimate.value.item() <= maximum


@pytest.mark.parametrize("metric", ["filter", "element"])
def test_a_network_of_zeros_cannot_be_displaced(mlp: Any, metric: Any) -> None:
    engine = with_weights(mlp, torch.zeros_like(mlp.engine().params))
    for measure in (worst_sharpness, local_entropy_gradient, gradient_norm):
        estimate = measure(engine, metric=metric)
        assert estimate.value.tolist() == [0.0] * 4
        assert bool(estimate.converged.all())
    assert bool(sam_sharpness(engine, metric=metric).value.isnan().all())


class Wall(nn.Module):
    """A loss that is not a number beyond 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x + torch.sqrt(1.0 - self.weight), torch.zeros_like(x)], dim=1)


def test_a_wall_in_the_ball_is_undefined() -> None:
    engine = engine_of([Wall()], torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0]))
    for radius, undefined in ((0.4, False), (0.6, True)):
        for estimate in (
            worst_sharpness(engine, radius=radius, metric="identity"),
            sam_sharpness(engine, kind="true", radius=radius),
            sam_sharpness(engine, radius=radius),
        ):
            assert estimate.value.isnan().item() is undefined
            assert estimate.converged.item() is not undefined


MEASURES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (gradient_norm, {}),
    (sam_sharpness, {}),
    (sam_sharpness, {"kind": "true"}),
    (sam_sharpness, {"batch": 1}),
    (worst_sharpness, {}),
    (worst_sharpness, {"batch": 1, "normalise_logits": True}),
    (local_entropy_gradient, {}),
    (local_entropy_gradient, {"batch": 1}),
]


@pytest.mark.parametrize(("measure", "options"), MEASURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_undefined_and_alone(
    mlp: Any, measure: Any, options: dict[str, Any], bad: float
) -> None:
    params = mlp.engine().params.clone()
    params[1, 3] = bad
    estimate, sound = measure(with_weights(mlp, params), **options), measure(mlp.engine(), **options)
    assert estimate.value.isnan().tolist() == [False, True, False, False]
    assert not estimate.converged[1].item()
    torch.testing.assert_close(estimate.value[[0, 2, 3]], sound.value[[0, 2, 3]], rtol=1e-9, atol=0)


def rescaled(module: Any, factor: float) -> nn.Module:
    """Return the same function: every hidden unit's incoming weights grow and its outgoing ones shrink."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other[0].parameters():
            parameter.mul_(factor)
        other[2].weight.div_(factor)
    result: nn.Module = other
    return result


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (gradient_norm, {}),
        (sam_sharpness, {"radius": 0.5}),
        (sam_sharpness, {"radius": 0.5, "kind": "true"}),
        (worst_sharpness, {"radius": 0.1, "norm": "l2"}),
        (worst_sharpness, {"radius": 0.1}),
        (local_entropy_gradient, {"max_samples": 16, "steps": 3}),
    ],
)
def test_invariance_under_relu_rescaling(mlp: Any, measure: Any, options: dict[str, Any]) -> None:
    moved = copy.copy(mlp)
    object.__setattr__(moved, "modules", [rescaled(module, 4.0) for module in mlp.modules])
    for metric, holds in (("element", True), ("identity", False)):
        before, after = (measure(problem.engine(), metric=metric, **options).value for problem in (mlp, moved))
        assert torch.allclose(before, after, rtol=1e-7) is holds


@pytest.mark.parametrize("measure", [gradient_norm, sam_sharpness, worst_sharpness, local_entropy_gradient])
def test_invariance_under_the_scale_of_a_filter_before_batch_norm(conv: Any, measure: Any) -> None:
    """In eval mode, with the running statistics scaled along; the filter's row scale grows as its weights do."""
    moved = copy.copy(conv)
    modules = [copy.deepcopy(module) for module in conv.modules]
    with torch.no_grad():
        for module in modules:
            module[0].weight.mul_(8.0)
            module[1].running_mean.mul_(8.0)
            module[1].running_var.add_(module[1].eps).mul_(64.0).sub_(module[1].eps)
    object.__setattr__(moved, "modules", modules)
    for metric, holds in (("filter", True), ("element", True), ("identity", False)):
        options = {"max_samples": 16, "steps": 3} if measure is local_entropy_gradient else {}
        before, after = (measure(problem.engine(), metric=metric, **options).value for problem in (conv, moved))
        assert torch.allclose(before, after, rtol=1e-7) is holds


def test_what_follows_the_gradient_takes_no_subset() -> None:
    for name in ("gradient_norm", "sam_sharpness", "worst_sharpness", "local_entropy_gradient"):
        with pytest.raises(RequestError, match=f"{name} does not take 'subset': "):
            parse_label(f"{name}(subset=100)")


def test_a_ball_has_a_radius() -> None:
    for label in ("sam_sharpness(radius=0)", "worst_sharpness(radius=-1)"):
        with pytest.raises(RequestError, match=r"radius = .*: should be greater than 0"):
            parse_label(label)
    with pytest.raises(RequestError, match="steps = 0: should be greater than or equal to 1"):
        parse_label("local_entropy_gradient(steps=0)")
