"""The base updates: against torch's and pytorch_optimizer's, and second-order ones against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from pytorch_optimizer import AdaHessian
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2
from tests.optimizers.conftest import (
    FLOAT,
    Logistic,
    Problem,
    Quadratics,
    Run,
    part,
    quadratics,
    randn,
    settings_of,
    step_of,
    times,
)
from torch import Tensor

from flatmin.optimizers.interface import Evaluation, HessianProduct, Step

TORCH: Mapping[str, Callable[[Tensor, Mapping[str, Any]], torch.optim.Optimizer]] = {
    "sgd": lambda w, s: torch.optim.SGD(
        [w], lr=s["lr"], momentum=s["momentum"], weight_decay=s["weight_decay"], nesterov=s["nesterov"]
    ),
    "adam": lambda w, s: torch.optim.Adam(
        [w], lr=s["lr"], betas=(s["beta1"], s["beta2"]), eps=s["adam_eps"], weight_decay=s["weight_decay"]
    ),
    "adamw": lambda w, s: torch.optim.AdamW(
        [w], lr=s["lr"], betas=(s["beta1"], s["beta2"]), eps=s["adam_eps"], weight_decay=s["weight_decay"]
    ),
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sgd", [{"momentum": 0.2 * k} for k in range(5)]),
        ("sgd", [{"momentum": 0.2 * k + 0.1, "nesterov": True} for k in range(5)]),
        ("adam", [{"beta1": 0.2 * k, "beta2": 1 - 0.3 ** (k + 1), "adam_eps": 10.0 ** (k - 8)} for k in range(5)]),
        ("adamw", [{"beta1": 0.2 * k, "beta2": 1 - 0.3 ** (k + 1), "adam_eps": 10.0 ** (k - 8)} for k in range(5)]),
    ],
)
def test_a_base_equals_torch(name: str, changes: Sequence[Mapping[str, Any]]) -> None:
    """100 steps of five models with five settings equal torch's own optimizer, one model at a time."""
    own = [settings_of(name, lr=0.01 * (k + 1), weight_decay=0.02 * k, **one) for k, one in enumerate(changes)]
    problem, params = quadratics(5, 6), randn(5, 6, seed=2)
    ours = Run(name, own, problem, params).go(100).params
    for k, settings in enumerate(own):
        w, alone = params[k].clone(), problem.select(torch.tensor([k]))
        theirs = TORCH[name](w, settings)
        for _ in range(100):
            w.grad = alone.evaluate(w[None]).grad[0]
            theirs.step()
        torch.testing.assert_close(ours[k], w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adahessian"])
def test_a_schedule_acts_as_another_learning_rate_of_each_model(name: str) -> None:
    """The weight decay that is decoupled from the gradient goes with it, as in torch.optim.AdamW."""
    params, found = randn(3, 5), Evaluation(torch.zeros(3, dtype=FLOAT), randn(3, 5, seed=1), lambda v: 2 * v)
    step, factor = step_of(3, [(5,)]), torch.tensor([[1.0], [0.1], [0.0]], dtype=FLOAT)
    base, scaled = (part(name, lr=0.3 * own, weight_decay=0.1) for own in (torch.ones_like(factor), factor))
    once, _ = base.update(params, found, base.init(params), replace(step, lr_factor=factor))
    torch.testing.assert_close(once, scaled.update(params, found, scaled.init(params), step)[0], rtol=1e-14, atol=0)
    assert torch.equal(once[2], params[2])


SHAPES = [(2, 3, 2, 2), (4, 3, 3), (2, 2, 1, 2, 2), (5, 4), (4,), ()]
"""Kernels of two, one and three axes, a matrix, a bias, a lone number."""

SIZES = [math.prod(shape) for shape in SHAPES]


def curved(diagonal: Tensor, seed: int = 1) -> Evaluation:
    """Return a random gradient where the Hessian is a diagonal `[K, d]`, so that z * Hz is exact."""
    return Evaluation(diagonal.sum(dim=1), randn(*diagonal.shape, seed=seed), lambda v: diagonal * v)


def denominators(base: Any, params: Tensor, found: Evaluation, step: Step) -> Tensor:
    """Return what AdaHessian divides by, read off a step without memory: w - w' = g / D."""
    after: Tensor = base.update(params, found, base.init(params), step)[0]
    return found.grad / (params - after)


MEMORYLESS: Mapping[str, Any] = {"lr": 1.0, "beta1": 0.0, "beta2": 0.0, "adahessian_eps": 1e-16}


def test_adahessian_minimises_a_diagonal_quadratic_in_one_step() -> None:
    """Its diagonal is exact there, so that without memory its step is Newton's."""
    d = 30
    diagonal = randn(3, d).abs() + 0.1
    problem = Quadratics(torch.diag_embed(diagonal)[None], randn(1, 3, d, seed=1), [1.0])
    settings = settings_of("adahessian", hessian_average="none", **MEMORYLESS)
    run = Run("adahessian", [settings] * 3, problem, randn(3, d, seed=2)).go()
    torch.testing.assert_close(run.params, problem.centres[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_adahessian_raises_the_diagonal_to_the_hessian_power(power: float) -> None:
    diagonal = randn(2, sum(SIZES))
    base = part("adahessian", hessian_average="none", hessian_power=power, **MEMORYLESS)
    found = denominators(base, randn(2, sum(SIZES), seed=3), curved(diagonal), step_of(2, SHAPES))
    torch.testing.assert_close(found, diagonal.abs() ** power, rtol=1e-9, atol=0)


@pytest.mark.parametrize("over", ["none", "spatial", "row"])
def test_adahessian_averages_over_kernels_and_rows(over: str) -> None:
    diagonal = randn(2, sum(SIZES))
    base = part("adahessian", hessian_average=over, **MEMORYLESS)
    found = denominators(base, randn(2, sum(SIZES), seed=3), curved(diagonal), step_of(2, SHAPES))
    for k in range(2):
        for part_of, own, shape in zip(
            torch.split(found[k], SIZES), torch.split(diagonal[k], SIZES), SHAPES, strict=True
        ):
            expected = own.abs().clone().reshape(shape)
            if len(shape) > 2 and over != "none":
                for o in range(shape[0]):
                    for i in range(shape[1]):
                        expected[o, i] = own.reshape(shape)[o, i].abs().mean()
            elif len(shape) == 2 and over == "row":
                for o in range(shape[0]):
                    expected[o] = own.reshape(shape)[o].abs().mean()
            torch.testing.assert_close(part_of.reshape(shape), expected, rtol=1e-9, atol=0)


def test_adahessian_averages_its_samples_of_z_hz_whose_mean_is_the_diagonal() -> None:
    models, d, samples = 3000, 5, 3
    hessian = quadratics(1, d).hessians[0].expand(models, -1, -1)
    found = Evaluation(torch.zeros(models), torch.ones(models, d, dtype=FLOAT), lambda v: times(hessian, v))
    base = part("adahessian", hessian_average="none", hessian_samples=samples, hessian_every=2, **MEMORYLESS)
    params, step = torch.zeros(models, d, dtype=FLOAT), step_of(models, [(d,)])
    _, state = base.update(params, found, base.init(params), step)
    drawn = [step.rademacher("adahessian", sample) for sample in range(samples)]
    expected = sum((z * times(hessian, z) for z in drawn), torch.zeros_like(params)) / samples
    torch.testing.assert_close(state["diagonal"], expected, rtol=1e-12, atol=1e-12)
    exact = hessian[0].diagonal()
    error = (hessian[0].square().sum(dim=1) - exact**2).div(samples * models).sqrt()
    assert ((state["diagonal"].mean(dim=0) - exact).abs() < 4 * error).all()
    assert (state["diagonal"].std(dim=0) > 0.9 * error * models**0.5).all()


def logistic(models: int, d: int) -> Logistic:
    return Logistic(randn(1, models, 12, d) + 0.5, [1.0])


@pytest.mark.parametrize(("power", "samples"), [(1.0, 1), (0.5, 1), (1.0, 3)])
def test_adahessian_equals_pytorch_optimizer(power: float, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps of three models on a loss whose Hessian changes, with the same random vectors."""
    shapes, d = [(2, 3), (3,)], 9
    problem, params = logistic(3, d), randn(3, d, seed=2)
    same: dict[str, Any] = {"hessian_power": power, "hessian_samples": samples, "hessian_average": "none"}
    own = [settings_of("adahessian", lr=0.05 * (k + 1), beta2=0.9, weight_decay=0.1 * k, **same) for k in range(3)]
    ours = Run("adahessian", own, problem, params, shapes=shapes).go(30).params
    for k, settings in enumerate(own):
        w, alone = params[k].clone(), problem.select(torch.tensor([k]))
        pieces = [
            piece.view(shape).requires_grad_() for piece, shape in zip(torch.split(w, [6, 3]), shapes, strict=True)
        ]
        theirs = _pytorch_optimizers(pieces, settings, num_samples=samples)
        for count in range(30):
            step = step_of(1, shapes, count=count, first_seed=k)
            draws = iter(
                [
                    (z / 2 + 0.5).view(shape)
                    for sample in range(samples)
                    for z, shape in zip(
                        torch.split(step.rademacher("adahessian", sample)[0], [6, 3]), shapes, strict=True
                    )
                ]
            )
            monkeypatch.setattr(torch, "randint_like", lambda p, low, high, draws=draws: next(draws))
            _set_grads_with_graph(pieces, alone)
            theirs.step()
            assert next(draws, None) is None
        torch.testing.assert_close(ours[k], _flat(pieces), rtol=0, atol=1e-10)


def test_adahessian_uses_its_last_diagonal_between_updates() -> None:
    """Against pytorch_optimizer, which is given in each step the diagonal of the last step that computes one."""
    every, shapes, d = 3, [(2, 3), (3,)], 9
    problem, params = logistic(1, d), randn(1, d, seed=2)
    settings = settings_of("adahessian", lr=0.05, beta2=0.9, hessian_every=every, hessian_average="none")
    run = Run("adahessian", [settings], problem, params, shapes=shapes)
    pieces = [
        piece.view(shape).requires_grad_()
        for piece, shape in zip(torch.split(params[0].clone(), [6, 3]), shapes, strict=True)
    ]
    theirs, diagonal = _pytorch_optimizers(pieces, settings), torch.empty(0)
    for count in range(10):
        found = problem.evaluate(_flat(pieces)[None])
        if count % every == 0:
            assert found.hvp is not None
            z = step_of(1, shapes, count=count).rademacher("adahessian")
            diagonal = (z * found.hvp(z))[0]
        for piece, grad, shape in zip(pieces, torch.split(found.grad[0], [6, 3]), shapes, strict=True):
            piece.grad = grad.view(shape)
        theirs.step(hessian=[own.view(shape) for own, shape in zip(torch.split(diagonal, [6, 3]), shapes, strict=True)])
        run.go()
        assert (run.answered[0].hvp is not None) is (count % every == 0)
        assert bool(run.drawn) is (count % every == 0)
        torch.testing.assert_close(run.params[0], _flat(pieces), rtol=0, atol=1e-12)


def _pytorch_optimizers(pieces: Sequence[Tensor], settings: Mapping[str, Any], num_samples: int = 1) -> AdaHessian:
    return AdaHessian(
        pieces,
        lr=settings["lr"],
        betas=(settings["beta1"], settings["beta2"]),
        weight_decay=settings["weight_decay"],
        hessian_power=settings["hessian_power"],
        num_samples=num_samples,
        eps=settings["adahessian_eps"],
    )


def _set_grads_with_graph(pieces: Sequence[Tensor], problem: Logistic) -> None:
    grads = torch.autograd.grad(problem.evaluate(_flat(pieces)[None]).losses.sum(), pieces, create_graph=True)
    for piece, grad in zip(pieces, grads, strict=True):
        piece.grad = grad


def _flat(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in pieces])


def scrn_step(g: Tensor, hvp: HessianProduct, **settings: Any) -> Tensor:
    """Return SCRN's step from the origin, where the gradient `[K, d]` and the Hessian are given."""
    base, origin = part("scrn", **settings), torch.zeros_like(g)
    found = Evaluation(torch.zeros(len(g), dtype=g.dtype), g, hvp)
    step = replace(step_of(len(g), [(g.shape[1],)]), dtype=g.dtype)
    after, _ = base.update(origin, found, base.init(origin), step)
    assert isinstance(after, Tensor)
    return after


def symmetric(models: int, d: int) -> Tensor:
    """Return random Hessians that are not definite."""
    factor = randn(models, d, d)
    return (factor + factor.mT) / 2


def test_scrns_cauchy_step_minimises_the_cubic_model_along_the_gradient() -> None:
    hessians, g = symmetric(6, 5), randn(6, 5, seed=1)
    rho = torch.linspace(0.1, 4, 6, dtype=FLOAT)[:, None]
    steps = scrn_step(g, lambda v: times(hessians, v), scrn_penalty=rho, scrn_smoothness=1e-3)
    for own, gradient, hessian, penalty in zip(steps, g, hessians, rho[:, 0], strict=True):
        along = -gradient / gradient.norm()

        def model(r: float, g: Tensor = gradient, h: Tensor = hessian, u: Tensor = along, p: Tensor = penalty) -> float:
            return float(r * (g @ u) + r**2 / 2 * (u @ h @ u) + p / 6 * r**3)

        best = minimize_scalar(model, bounds=(0, 100), method="bounded", options={"xatol": 1e-9})
        torch.testing.assert_close(own @ along, torch.tensor(best.x, dtype=FLOAT), rtol=1e-6, atol=0)
        torch.testing.assert_close(own, (own @ along) * along, rtol=0, atol=1e-14)


@pytest.mark.parametrize("curvature", [-1e12, -1e3, -1.0, 0.0, 1.0, 1e3, 1e8, 1e12, 1e16])
def test_scrns_cauchy_step_has_all_digits_at_any_curvature(curvature: float) -> None:
    """Where c is large, -c + sqrt(c^2 + 2 |g| / rho) is the difference of two numbers that are nearly alike."""
    g = randn(1, 5)
    rho = 0.7
    step = scrn_step(g, lambda v: curvature * v, scrn_penalty=rho, scrn_smoothness=1e-3)
    with localcontext(prec=80):
        norm = sum((Decimal(float(x)) ** 2 for x in g[0]), Decimal(0)).sqrt()
        c = Decimal(curvature) / Decimal(rho)
        expected = (c**2 + 2 * norm / Decimal(rho)).sqrt() - c
    torch.testing.assert_close(step.norm(), torch.tensor(float(expected), dtype=FLOAT), rtol=1e-14, atol=0)


def test_scrns_inner_steps_reach_the_global_minimiser_of_the_cubic_model() -> None:
    """Its g + H D + (rho / 2) |D| D = 0 with H + (rho / 2) |D| positive semi-definite: an equation in |D| alone."""
    hessians, g, rho, smoothness = symmetric(4, 4) / 2, randn(4, 4, seed=1), 1.5, 2.5
    assert (torch.linalg.eigvalsh(hessians)[:, 0] < -0.3).all()
    assert (g.norm(dim=1) < smoothness**2 / rho).all()
    steps = scrn_step(
        g,
        lambda v: times(hessians, v),
        scrn_penalty=rho,
        scrn_smoothness=smoothness,
        scrn_steps=6000,
        scrn_noise=0.0,
    )
    for own, gradient, hessian in zip(steps, g, hessians, strict=True):
        values, vectors = torch.linalg.eigh(hessian)
        rotated = vectors.T @ gradient

        def length_beyond(r: float, values: Tensor = values, rotated: Tensor = rotated) -> float:
            return float((rotated / (values + rho / 2 * r)).norm()) - r

        least = max(0.0, -2 * float(values[0]) / rho)
        r = brentq(length_beyond, least + 1e-9, least + 100, xtol=1e-14)
        expected = -vectors @ (rotated / (values + rho / 2 * r))
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-9)


def test_scrn_equals_a_loop_over_each_model_with_both_cases_and_the_stop() -> None:
    """The noise is drawn once for all inner steps; a model whose |H D| is above the stop keeps its D."""
    models, d, steps = 8, 5, 12
    hessians = symmetric(models, d) * torch.logspace(-1, 1.5, models, dtype=FLOAT)[:, None, None]
    g = randn(models, d, seed=1) * torch.tensor([1.0, 30.0] * 4, dtype=FLOAT)[:, None]
    smoothness, rho, noise, tolerance, stop = 2.0, 0.4, 3.0, 0.01, 0.8
    found = scrn_step(
        g,
        lambda v: times(hessians, v),
        scrn_penalty=rho,
        scrn_smoothness=smoothness,
        scrn_steps=steps,
        scrn_noise=noise,
        scrn_tolerance=tolerance,
        scrn_stop=stop,
    )
    drawn, done = step_of(models, [(d,)]).normal("scrn"), []
    for k in range(models):
        own, hessian, norm = torch.zeros(d, dtype=FLOAT), hessians[k], g[k].norm()
        if norm >= smoothness**2 / rho:
            c = g[k] @ hessian @ g[k] / (rho * norm**2)
            own = -((c**2 + 2 * norm / rho).sqrt() - c) * g[k] / norm
            done.append(-1)
        else:
            noisy = g[k] + noise * math.sqrt(tolerance * rho) / smoothness * drawn[k] / drawn[k].norm()
            inner = 0
            while inner < steps and (hessian @ own).norm() <= stop:
                own = own - (noisy + hessian @ own + rho / 2 * own.norm() * own) / (20 * smoothness)
                inner += 1
            done.append(inner)
        torch.testing.assert_close(found[k], own, rtol=1e-11, atol=1e-13)
    assert done.count(-1) > 1
    assert done.count(steps) > 1
    assert any(0 < inner < steps for inner in done)


def test_scrns_noise_is_on_the_sphere_and_has_no_mean() -> None:
    """At a stationary point of a plane, one inner step is the noise alone."""
    models, d = 4000, 6
    smoothness, rho, noise, tolerance = 0.5, 0.3, 0.2, 1e-2
    step = scrn_step(
        torch.zeros(models, d, dtype=FLOAT),
        torch.zeros_like,
        scrn_steps=1,
        scrn_penalty=rho,
        scrn_smoothness=smoothness,
        scrn_noise=noise,
        scrn_tolerance=tolerance,
    )
    on_sphere = -step * 20 * smoothness / (noise * math.sqrt(tolerance * rho) / smoothness)
    torch.testing.assert_close(on_sphere.norm(dim=1), torch.ones(models, dtype=FLOAT), rtol=1e-13, atol=0)
    assert models * d * on_sphere.mean(dim=0).square().sum() < chi2.ppf(0.999, d)
    spread = on_sphere.T @ on_sphere / models * d - torch.eye(d, dtype=FLOAT)
    assert (spread.abs() < 5 / math.sqrt(models)).all()


def test_scrns_noise_leaves_a_saddle_and_goes_where_the_cubic_model_is_least() -> None:
    """Along the direction of negative curvature -1, at the distance 2 / rho."""
    rho, curvature = 0.8, torch.tensor([1.0, 0.5, -1.0], dtype=FLOAT)
    settings = {"scrn_penalty": rho, "scrn_smoothness": 1.0, "scrn_steps": 1500, "scrn_tolerance": 1e-6}
    at_saddle = torch.zeros(5, 3, dtype=FLOAT)
    away = scrn_step(at_saddle, lambda v: curvature * v, scrn_noise=0.1, **settings)
    torch.testing.assert_close(away[:, 2].abs(), torch.full((5,), 2 / rho, dtype=FLOAT), rtol=1e-3, atol=0)
    assert (away[:, :2].abs() < 1e-3).all()
    assert torch.equal(scrn_step(at_saddle, lambda v: curvature * v, scrn_noise=0.0, **settings), at_saddle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scrn_stays_where_it_is_at_a_minimum_beside_a_steep_model(dtype: torch.dtype) -> None:
    """Both cases are computed for all models: the division by |g| = 0 of the one must not reach the other."""
    g = torch.zeros(2, 4, dtype=dtype)
    g[1] = 50.0
    step = scrn_step(g, lambda v: v, scrn_noise=0.0)
    assert torch.equal(step[0], torch.zeros(4, dtype=dtype))
    assert step[1].isfinite().all()
    assert (step[1] < 0).all()


def test_scrn_takes_newtons_step_where_the_cubic_term_is_nothing() -> None:
    """One step from anywhere ends close to the minimum of a quadratic: the Hessian is that of the rule's gradient."""
    problem: Problem = quadratics(3, 4)
    settings = settings_of("scrn", scrn_penalty=1e-9, scrn_smoothness=4.0, scrn_steps=6000, scrn_noise=0.0)
    settings["scrn_stop"] = 1e9
    run = Run("scrn", [settings] * 3, problem, randn(3, 4, seed=5)).go()
    assert isinstance(problem, Quadratics)
    torch.testing.assert_close(run.params, problem.centres[0], rtol=0, atol=1e-3)
