"""The loss under noise in the weights: lpf_gap, lpf_relative, average_sharpness and local_entropy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin.errors import FlatminError
from flatmin.sharpness import Engine, Estimate
from flatmin.sharpness.average_sharpness import average_sharpness
from flatmin.sharpness.local_entropy import local_entropy
from flatmin.sharpness.lpf import lpf
from flatmin.sharpness.lpf_gap import lpf_gap
from flatmin.sharpness.lpf_relative import lpf_relative
from flatmin.stack import Batch, StackedNetwork

METRICS = ["identity", "filter", "element"]
MANY = 20_000


def draws(problem: Any, sigma: float, metric: Any, count: int, *, stream: str = "another stream") -> Tensor:
    """Return the losses of model 0 at noisy weights, `[count]`, by the network's own forward passes."""
    engine = problem.engine().select(torch.tensor([0]))
    loss, flat = problem.loss_of(0)
    noise = sigma * engine.scale(metric)[0] * engine.vectors("normal", stream, 0, count)[:, 0]
    result: Tensor = torch.func.vmap(loss)(flat + noise)
    return result


@pytest.mark.parametrize("metric", METRICS)
def test_all_are_functions_of_the_draws_of_lpf(repeated: Callable[[int], Any], metric: Any) -> None:
    problem, count = repeated(1), 16
    centre = problem.loss_of(0)[0](problem.loss_of(0)[1])
    losses = draws(problem, 0.1, metric, count, stream="perturbation")
    options: dict[str, Any] = {"metric": metric, "tolerance": 1e-9, "max_samples": count}

    def check(estimate: Estimate, value: Tensor, stderr: Tensor) -> None:
        assert estimate.samples.tolist() == [count]
        torch.testing.assert_close(estimate.value[0], value, rtol=1e-9, atol=0)
        torch.testing.assert_close(estimate.stderr[0], stderr, rtol=1e-9, atol=0)

    error = losses.std() / math.sqrt(count)
    check(lpf(problem.engine(), sigma=0.1, **options), losses.mean(), error)
    check(lpf_gap(problem.engine(), sigma=0.1, **options), losses.mean() - centre, error)
    check(average_sharpness(problem.engine(), sigma=0.1, **options), losses.mean() - centre, error)
    check(lpf_relative(problem.engine(), sigma=0.1, **options), losses.mean() / centre - 1, error / centre)
    sizes = (losses - centre).abs() / centre
    check(
        lpf_relative(problem.engine(), sigma=0.1, absolute=True, **options),
        sizes.mean(),
        sizes.std() / math.sqrt(count),
    )
    shares = (-losses).exp()
    relative = shares.std() / shares.mean() / math.sqrt(count)
    check(local_entropy(problem.engine(), **options), -shares.mean().log() - relative.square() / 2, relative)


def test_draws_are_made_once(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = mlp.engine(), 0
    inner = engine.losses_at

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        made: Tensor = inner(*arguments)
        return made

    monkeypatch.setattr(engine, "losses_at", counted)
    lpf(engine, max_samples=16)
    once = calls
    for measure in (lpf_gap, lpf_relative):
        measure(engine, max_samples=16)
    local_entropy(engine, gamma=1e4, max_samples=16)
    assert calls == once > 0
    lpf_gap(engine, sigma=0.02, max_samples=16)
    assert calls == 2 * once


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (lpf_gap, {"sigma": 0.05}),
        (lpf_relative, {"sigma": 0.05}),
        (lpf_relative, {"sigma": 0.05, "absolute": True}),
        (average_sharpness, {"sigma": 0.2}),
        (local_entropy, {"gamma": 400.0}),
        (local_entropy, {"gamma": 100.0, "tolerance": 0.1}),
    ],
)
def test_intervals_cover(repeated: Callable[[int], Any], coverage: Any, measure: Any, options: dict[str, Any]) -> None:
    problem, seeds = repeated(400), 400
    centre = problem.engine().losses()[0]
    sigma = options.get("sigma") or options["gamma"] ** -0.5
    many = draws(problem, sigma, "element" if measure is average_sharpness else "filter", MANY)
    if measure is local_entropy:
        truth, blur = -(-many).exp().mean().log(), (-many).exp().std() / (-many).exp().mean()
    else:
        rise = (many - centre).abs() if options.get("absolute") else many - centre
        unit = centre if measure is lpf_relative else 1.0
        truth, blur = rise.mean() / unit, rise.std() / unit
    estimate = measure(problem.engine(), **{"tolerance": 0.05, "max_samples": 512, **options})
    assert bool(estimate.converged.all())
    spread = estimate.value.std().item()
    assert blur.item() / math.sqrt(MANY) < 0.4 * spread, "the truth must be known better than the estimates"
    error = math.hypot(spread / math.sqrt(seeds), blur.item() / math.sqrt(MANY))
    assert abs(estimate.value.mean().item() - truth.item()) < 4 * error
    assert 0.90 <= coverage(estimate, truth.item()) <= 0.99


def test_the_gap_is_half_the_trace_at_a_small_sigma(repeated: Callable[[int], Any]) -> None:
    problem = repeated(50)
    engine = problem.engine()
    d = engine.scale("filter")[0]
    expected = 0.5 * 0.005**2 * (d**2 * problem.hessian(0).diagonal()).sum().item()
    estimate = lpf_gap(engine, sigma=0.005)
    assert estimate.value.mean().item() == pytest.approx(expected, rel=0.01)
    assert bool((estimate.passes >= 1 + estimate.samples).all())


def test_the_tolerance_is_relative_to_the_gap(repeated: Callable[[int], Any]) -> None:
    """A gap much smaller than the loss takes more draws than the loss does, or does not converge."""
    problem = repeated(4)
    gap = lpf_gap(problem.engine(), sigma=0.01, tolerance=0.01, max_samples=16)
    loss = lpf(problem.engine(), sigma=0.01, tolerance=0.01, max_samples=16)
    assert bool(loss.converged.all())
    torch.testing.assert_close(gap.stderr, loss.stderr)
    assert not bool(gap.converged.any())


@pytest.mark.parametrize(
    ("options", "sign", "power", "factor"),
    [
        ({"normaliser": "volume"}, -1, 0.5, lambda d, g: d / 2 * math.log(2 * math.pi / g)),
        ({"exponent": "loss"}, 1, 0.5, lambda d, g: 0.0),
        ({"deviation": "reciprocal"}, -1, 1.0, lambda d, g: 0.0),
        (
            {"exponent": "loss", "deviation": "reciprocal", "normaliser": "published"},
            1,
            1.0,
            lambda d, g: d / 2 * math.log(2 * math.pi) - math.log(math.sqrt(g)),
        ),
    ],
    ids=["volume", "sign", "deviation", "as published"],
)
def test_what_the_published_local_entropy_computes(
    repeated: Callable[[int], Any], options: Any, sign: int, power: float, factor: Callable[[int, float], float]
) -> None:
    problem, gamma = repeated(1), 30.0
    losses = draws(problem, gamma**-power, "filter", 16, stream="perturbation")
    estimate = local_entropy(problem.engine(), gamma=gamma, tolerance=1e-9, max_samples=16, **options)
    published = -(torch.logsumexp(sign * losses, 0) - math.log(16) + factor(problem.engine().n_params, gamma))
    relative = (sign * losses).exp().std() / (sign * losses).exp().mean() / 4
    torch.testing.assert_close(estimate.value[0], published - relative.square() / 2, rtol=1e-9, atol=0)


def test_a_local_entropy_of_losses_beyond_exp_is_finite(mlp: Any) -> None:
    engine = mlp.engine()
    high = engine.with_loss(lambda outputs, targets: 5000.0 + engine.loss(outputs, targets))
    estimate, low = local_entropy(high), local_entropy(engine)
    torch.testing.assert_close(estimate.value, 5000.0 + low.value, rtol=1e-6, atol=0)


def test_a_loss_of_zero_has_no_relative_rise(mlp: Any) -> None:
    whole = mlp.engine()
    nothing = whole.with_loss(lambda outputs, targets: (outputs.abs().amax(dim=1) - 4.0).clamp(min=0.0))
    assert nothing.losses().tolist() == [0.0] * 4
    estimate = lpf_relative(nothing)
    assert bool(estimate.value.isnan().all())
    assert not bool(estimate.converged.any())
    assert lpf_gap(nothing).value.tolist() == [0.0] * 4


def rescaled(module: Any, factor: float) -> nn.Module:
    """Return the same function: every hidden unit's incoming weights grow and its outgoing ones shrink."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other[0].parameters():
            parameter.mul_(factor)
        other[2].weight.div_(factor)
    result: nn.Module = other
    return result


@pytest.mark.parametrize(("metric", "holds"), [("element", True), ("identity", False)])
def test_invariance_under_relu_rescaling(mlp: Any, metric: Any, holds: bool) -> None:
    moved = copy.copy(mlp)
    object.__setattr__(moved, "modules", [rescaled(module, 3.0) for module in mlp.modules])
    for measure in (lpf_gap, average_sharpness):
        before = measure(mlp.engine(), sigma=0.2, metric=metric, max_samples=32)
        after = measure(moved.engine(), sigma=0.2, metric=metric, max_samples=32)
        assert torch.allclose(before.value, after.value, rtol=1e-8) is holds


def test_normalised_logits_forget_their_size(mlp: Any) -> None:
    """The last layer times 7 is the same network, in proportion to its weights, once logits are normalised."""
    louder = copy.copy(mlp)
    modules = [copy.deepcopy(module) for module in mlp.modules]
    with torch.no_grad():
        for module in modules:
            for parameter in module[2].parameters():
                parameter.mul_(7.0)
    object.__setattr__(louder, "modules", modules)
    for normalise, same in ((True, True), (False, False)):
        before = average_sharpness(mlp.engine(), normalise_logits=normalise, max_samples=32)
        after = average_sharpness(louder.engine(), normalise_logits=normalise, max_samples=32)
        assert torch.allclose(before.value, after.value, rtol=1e-8) is same
    logits = mlp.modules[0](mlp.x)
    unit = (logits - logits.mean(dim=1, keepdim=True)) / (logits - logits.mean(dim=1, keepdim=True)).norm(
        dim=1, keepdim=True
    )
    expected = nn.functional.cross_entropy(unit, mlp.y[0]).item()
    from flatmin.sharpness.outputs import with_normalised_logits

    assert with_normalised_logits(mlp.engine()).losses()[0].item() == pytest.approx(expected, rel=1e-12)


def test_one_output_has_no_logits_to_normalise() -> None:
    module = nn.Linear(3, 1).double()
    params, buffers = StackedNetwork.stack([module])
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(1, 8, 1, dtype=torch.float64)
    engine = Engine(
        StackedNetwork(module),
        params,
        buffers,
        [Batch(x, y, shared=True)],
        torch.tensor([0]),
        loss=lambda outputs, targets: (outputs - targets).square().flatten(1).mean(dim=1),
    )
    with pytest.raises(FlatminError, match=r"two classes or more are needed.*got \[.*1\]"):
        average_sharpness(engine, normalise_logits=True)


@pytest.mark.parametrize("measure", [lpf_gap, lpf_relative, average_sharpness, local_entropy])
def test_a_model_that_is_not_finite_is_undefined_and_alone(mlp: Any, measure: Any) -> None:
    whole = mlp.engine()
    params = whole.params.clone()
    params[1, 3] = math.nan
    broken = Engine(whole.network, params, whole.buffers, whole.batches, mlp.keys)
    estimate, sound = measure(broken, max_samples=16), measure(whole, max_samples=16)
    assert estimate.value.isnan().tolist() == [False, True, False, False]
    assert not estimate.converged[1].item()
    torch.testing.assert_close(estimate.value[[0, 2, 3]], sound.value[[0, 2, 3]])


def test_an_entropy_that_few_draws_carry_has_not_converged(repeated: Callable[[int], Any]) -> None:
    engine = repeated(20).engine()
    narrow, wide = (local_entropy(engine, gamma=gamma, tolerance=0.2) for gamma in (100.0, 0.05))
    assert engine.losses_at(0.05**-0.5 * engine.scale("filter") * engine.vectors("normal", "x", 0, 50)).std() > 2
    assert bool(narrow.converged.all())
    assert bool(wide.value.isfinite().all())
    assert not bool(wide.converged.any())


def test_a_network_of_zeros_is_flat(mlp: Any) -> None:
    whole = mlp.engine()
    dead = Engine(whole.network, torch.zeros_like(whole.params), whole.buffers, whole.batches, mlp.keys)
    for measure, expected in (
        (lpf_gap, 0.0),
        (lpf_relative, 0.0),
        (average_sharpness, 0.0),
        (local_entropy, math.log(3)),
    ):
        estimate = measure(dead)
        torch.testing.assert_close(
            estimate.value, torch.full((4,), expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )
