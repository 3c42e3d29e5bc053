"""Slices of the loss surface: every value against a loss evaluated directly, directions against dense matrices."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin.errors import FlatminError, RequestError
from flatmin.sharpness import Engine, measure, measure_all, surface_between
from flatmin.sharpness.loss_surface import loss_surface


def with_initial(problem: Any, **changes: Any) -> Engine:
    made = problem.engine((6,))
    initial = made.params + torch.linspace(-0.5, 0.5, made.n_params, dtype=torch.float64)
    return Engine(made.network, made.params, made.buffers, made.batches, made.keys, initial=initial, **changes)


def top_two(problem: Any, engine: Engine, metric: Any, k: int) -> tuple[Tensor, Tensor]:
    """Return the two largest eigenvalues of D H D, and D v of their vectors, `[2, d]`."""
    d = engine.scale(metric)[k]
    values, vectors = torch.linalg.eigh(d[:, None] * problem.hessian(k) * d)
    return values[-2:].flip(0), (d[:, None] * vectors[:, -2:]).flip(1).T


def parts(engine: Engine, flat: Tensor) -> list[Tensor]:
    pieces = torch.split(flat, engine.network.sizes)
    return [piece.reshape(shape) for piece, shape in zip(pieces, engine.network.shapes, strict=True)]


def random_directions(engine: Engine, k: int, *, move_vectors: bool) -> Tensor:
    """Return the two filter-normalised directions by loops over filters, `[2, d]`."""
    made = []
    for drawn in engine.vectors("normal", "surface", 0, 2)[:, k]:
        pieces = []
        for d, w in zip(parts(engine, drawn), parts(engine, engine.params[k]), strict=True):
            if w.dim() > 1:
                pieces += [(own / own.norm() * of.norm()).flatten() for own, of in zip(d, w, strict=True)]
            else:
                pieces.append(d.sign() * w.abs() if move_vectors else torch.zeros_like(w))
        made.append(torch.cat(pieces))
    return torch.stack(made)


def expected_directions(problem: Any, engine: Engine, kind: str, k: int) -> Tensor:
    random = random_directions(engine, k, move_vectors=False)
    if kind == "initial":
        return torch.stack([engine.initial_weights()[k] - engine.params[k], random[0]])
    return random if kind == "random" else top_two(problem, engine, "filter", k)[1]


@pytest.mark.parametrize("kind", ["random", "hessian", "initial"])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_every_point_is_the_loss_there(problem: Any, kind: Any, dimensions: Any) -> None:
    engine = with_initial(problem)
    estimate = loss_surface(engine, dimensions=dimensions, directions=kind, reach=0.8, points_per_axis=5)
    (curve,) = estimate.curves
    assert curve.kind == "surface"
    assert (curve.y is None) == (dimensions == 1)
    assert bool(estimate.converged.all())
    for k in range(len(engine)):
        loss, flat = problem.loss_of(k)
        directions = expected_directions(problem, engine, kind, k)[:dimensions]
        ticks = [-0.8, -0.4, 0.0, 0.4, 0.8]
        places = [(x,) for x in ticks] if dimensions == 1 else [(x, y) for x in ticks for y in ticks]
        if kind == "hessian":  # the sign of an eigenvector is free
            signs = curve_signs(loss, flat, directions, curve, k)
            directions = directions * signs[:, None]
        rises = []
        for number, place in enumerate(places):
            at = flat + sum(step * direction for step, direction in zip(place, directions, strict=True))
            assert curve.x[k, number].item() == pytest.approx(place[0])
            if curve.y is not None:
                assert curve.y[k, number].item() == pytest.approx(place[1])
            assert curve.value[k, number].item() == pytest.approx(
                float(loss(at)), rel=1e-4 if kind == "hessian" else 1e-9
            )
            if math.hypot(*place) <= 0.8 + 1e-9:
                rises.append(float(loss(at)) - float(loss(flat)))
        assert estimate.value[k].item() == pytest.approx(max(rises), rel=1e-4 if kind == "hessian" else 1e-9)


def curve_signs(loss: Any, flat: Tensor, directions: Tensor, curve: Any, k: int) -> Tensor:
    """Return 1 or -1 for each direction, as the curve goes along its axis."""
    signs = []
    for axis, direction in enumerate(directions):
        other = curve.y if axis == 0 else curve.x
        along = curve.x if axis == 0 else curve.y
        edge = (along[k] - 0.8).abs() < 1e-9
        if other is not None:
            edge &= other[k].abs() < 1e-9
        found = curve.value[k][edge].item()
        signs.append(min((1.0, -1.0), key=lambda sign: abs(float(loss(flat + 0.8 * sign * direction)) - found)))
    return torch.tensor(signs, dtype=torch.float64)


@pytest.mark.parametrize("metric", ["identity", "filter", "element"])
def test_eigenvector_directions_have_the_curvature_of_the_dense_hessian(problem: Any, metric: Any) -> None:
    """Second differences of the slice, in steps too small for a kink, are the two largest eigenvalues."""
    engine, step = problem.engine(), 1e-4
    found = loss_surface(engine, dimensions=2, directions="hessian", reach=step, points_per_axis=3, metric=metric)
    (curve,) = found.curves
    for k in range(len(engine)):
        grid = curve.value[k].reshape(3, 3)
        values, _ = top_two(problem, engine, metric, k)
        curvature = torch.stack([grid[0, 1] + grid[2, 1], grid[1, 0] + grid[1, 2]]) - 2 * grid[1, 1]
        mixed = (grid[2, 2] - grid[2, 0] - grid[0, 2] + grid[0, 0]) / 4
        torch.testing.assert_close(curvature / step**2, values, rtol=2e-3, atol=1e-5)
        assert abs(mixed.item() / step**2) < 2e-3 * values[0].item() + 1e-5


def test_biases_and_norms_move_when_asked(conv: Any) -> None:
    engine = conv.engine()
    (curve,) = loss_surface(engine, move_vectors=True, points_per_axis=3).curves
    for k in range(len(engine)):
        loss, flat = conv.loss_of(k)
        (direction, _) = random_directions(engine, k, move_vectors=True)
        for step, value in zip((-1.0, 0.0, 1.0), curve.value[k], strict=True):
            assert value.item() == pytest.approx(float(loss(flat + step * direction)), rel=1e-9)


def test_the_line_to_the_initial_weights_ends_there(mlp: Any) -> None:
    engine = with_initial(mlp)
    (curve,) = loss_surface(engine, directions="initial").curves
    torch.testing.assert_close(curve.value[:, -1], engine.losses(engine.initial_weights()), rtol=1e-12, atol=0)
    torch.testing.assert_close(curve.value[:, 10], engine.losses(), rtol=1e-12, atol=0)


def test_too_little_memory_for_eigenvectors_is_said(mlp: Any) -> None:
    estimate = loss_surface(mlp.engine(memory=0), directions="hessian", points_per_axis=3)
    assert not bool(estimate.converged.any())
    assert bool(estimate.stderr.isnan().all())
    assert estimate.samples.tolist() == [3 + 2] * 4
    assert estimate.passes.tolist() == [3 + 4 * 2] * 4


def test_eigenvectors_do_not_depend_on_what_was_measured_before(mlp: Any) -> None:
    label = "loss_surface(directions=hessian, dimensions=2, points_per_axis=3)"
    alone = measure_all(mlp.engine(), [label])
    after = measure_all(mlp.engine(), ["lambda_max(tolerance=1e-9)", label])
    assert after.points[1] == alone.points[0]


def test_an_infinite_loss_within_reach_is_no_rise(mlp: Any) -> None:
    params = mlp.engine().params.clone()
    params[1] *= 1e200
    whole = mlp.engine()
    estimate = loss_surface(Engine(whole.network, params, whole.buffers, whole.batches, mlp.keys))
    assert estimate.value.isnan().tolist() == [False, True, False, False]
    assert estimate.converged.tolist() == [True, False, True, True]


def test_without_initial_weights_it_says_so(mlp: Any) -> None:
    with pytest.raises(FlatminError, match="initial weights are needed"):
        loss_surface(mlp.engine(), directions="initial")


def small(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
        model(torch.randn(50, 4, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize("memory", [2**31, 1])
def test_the_line_between_two_models(memory: int) -> None:
    first, second = small(0), small(1)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    frame = surface_between(first, second, nn.CrossEntropyLoss(), (x, y), points=7, reach=0.5, memory=memory)
    assert list(frame.columns) == ["kind", "settings", "x", "y", "value"]
    assert frame["x"].tolist() == pytest.approx([-0.5 + step / 3 for step in range(7)])
    assert frame["y"].isna().all()
    assert json.loads(frame["settings"][0]) == {"directions": "between", "label": "between", "reach": 0.5}
    mixed = small(2)
    for t, value in zip(frame["x"], frame["value"], strict=True):
        a, b = first.state_dict(), second.state_dict()
        weights = {name for name, _ in mixed.named_parameters()}
        steps = {key: t if key in weights else min(max(t, 0.0), 1.0) for key in a if a[key].is_floating_point()}
        mixed.load_state_dict({key: (1 - steps[key]) * a[key] + steps[key] * b[key] for key in steps}, strict=False)
        assert value == pytest.approx(nn.functional.cross_entropy(mixed.eval()(x), y).item(), rel=1e-9)


def test_two_models_of_different_networks_are_refused() -> None:
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    with pytest.raises(RequestError, match=r"second: the parameter '0.weight' is missing"):
        surface_between(small(0), nn.ReLU(), "cross_entropy", (x, y))


def test_curves_from_python() -> None:
    x, y = torch.randn(70, 4, dtype=torch.float64), torch.randint(3, (70,))
    frame = measure(small(0), "cross_entropy", (x, y), ["loss_surface(subset=64, dimensions=2, points_per_axis=3)"])
    assert frame["passes"][0] > 0
    assert frame["stderr"][0] > 0
