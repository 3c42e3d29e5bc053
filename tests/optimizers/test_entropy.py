"""Entropy-SGD's rule on quadratics: its Langevin steps, noise and gamma against closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.optimizers.conftest import (
    FLOAT,
    SHAPES,
    D,
    Quadratics,
    asked,
    column,
    part,
    quadratics,
    randn,
    step_of,
    times,
)
from torch import Tensor


def langevin(w: Tensor, hessians: Sequence[Tensor], centres: Sequence[Tensor], **s: float) -> Tensor:
    """Return (x, v, mu) after noise-free Langevin steps from x = mu = w `[d]`, v = 0, as one product of matrices.

    A step is linear in (x, v, mu, 1) on a quadratic: v' = momentum v + (H + (gamma + decay) I) x - H c - gamma w,
    x' = x - r v', mu' = average mu + (1 - average) x'.
    """
    d = len(w)
    eye, zero, none = torch.eye(d, dtype=FLOAT), torch.zeros(d, d, dtype=FLOAT), torch.zeros(d, 1, dtype=FLOAT)
    vector = torch.cat([w, torch.zeros(d, dtype=FLOAT), w, torch.ones(1, dtype=FLOAT)])
    for h, c in zip(hessians, centres, strict=True):
        pull = h + (s["gamma"] + s["decay"]) * eye
        constant = -(h @ c + s["gamma"] * w)[:, None]
        velocity = torch.cat([pull, s["momentum"] * eye, zero, constant], dim=1)
        position = torch.cat([eye, zero, zero, none], dim=1) - s["lr"] * velocity
        mean = torch.cat([zero, zero, s["average"] * eye, none], dim=1) + (1 - s["average"]) * position
        last = torch.zeros(1, 3 * d + 1, dtype=FLOAT)
        last[0, -1] = 1
        vector = (
            torch.cat([velocity, position, mean, last])[[*range(d, 2 * d), *range(d), *range(2 * d, 3 * d + 1)]]
            @ vector
        )
    return vector[: 3 * d].reshape(3, d)


INNER = {"lr": (0.1, 0.05), "momentum": (0.9, 0.3), "average": (0.75, 0.2), "decay": (1e-2, 0.3), "gamma": (0.5, 2.0)}


def entropy(**changes: Any) -> Any:
    """Return Entropy-SGD's rule for the two models of `INNER`, without noise."""
    settings: dict[str, Any] = {
        "entropy_lr": column(*INNER["lr"]),
        "entropy_momentum": column(*INNER["momentum"]),
        "entropy_average": column(*INNER["average"]),
        "entropy_weight_decay": column(*INNER["decay"]),
        "entropy_gamma": column(*INNER["gamma"]),
        "entropy_scoping": 0.0,
        "entropy_gamma_max": 100.0,
        "entropy_noise": 0.0,
    }
    return part("entropy", **{**settings, **changes})


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_entropys_langevin_steps_without_noise_are_a_product_of_matrices(steps: int) -> None:
    """Each on a fresh batch; the gradient is gamma (w - mu)."""
    problem, w = quadratics(2, D, steps), randn(2, D, seed=2)
    done = asked(entropy(entropy_steps=steps), problem, w, step_of(2, SHAPES, batches=steps))
    for k in range(2):
        own = {key: values[k] for key, values in INNER.items()}
        hessians, centres = problem.hessians[:, k], problem.centres[:, k]
        _, _, mu = langevin(w[k], list(hessians), list(centres), **own)
        torch.testing.assert_close(done.found.grad[k], own["gamma"] * (w[k] - mu), rtol=0, atol=1e-11)
        for step, point in enumerate(done.points):
            x, _, _ = langevin(w[k], list(hessians[:step]), list(centres[:step]), **own)
            torch.testing.assert_close(point[k], x, rtol=0, atol=1e-11)
    assert torch.equal(done.found.losses, problem.evaluate(w, 0).losses)


def test_entropy_takes_as_many_steps_as_there_are_batches() -> None:
    """An epoch's last step has fewer."""
    problem, w = quadratics(2, D, 2), randn(2, D, seed=2)
    few = asked(entropy(entropy_steps=5), problem, w, step_of(2, SHAPES, batches=2)).found.grad
    assert torch.equal(few, asked(entropy(entropy_steps=2), problem, w, step_of(2, SHAPES, batches=2)).found.grad)


def test_entropys_gradient_is_that_of_the_local_entropy_after_many_steps() -> None:
    """Of -log of the integral of exp(-L(x) - gamma |x - w|^2 / 2): gamma (w - mean of x), and on a quadratic the mean
    of x is (H + gamma)^-1 (H c + gamma w).
    """
    steps, gamma = 600, column(0.5, 2.0)
    one, w = quadratics(2, D), randn(2, D, seed=2)
    problem = Quadratics(one.hessians.expand(steps, -1, -1, -1), one.centres.expand(steps, -1, -1), [1.0] * steps)
    rule = entropy(entropy_steps=steps, entropy_weight_decay=0.0, entropy_gamma=gamma)
    found = asked(rule, problem, w, step_of(2, SHAPES, batches=steps)).found
    h, c = one.hessians[0], one.centres[0]
    system = h + gamma[..., None] * torch.eye(D, dtype=FLOAT)
    mean = torch.linalg.solve(system, times(h, c) + gamma * w)
    torch.testing.assert_close(found.grad, gamma * (w - mean), rtol=0, atol=1e-9)


def test_entropys_noise_moves_the_weights_and_not_the_momentum() -> None:
    """The difference of two runs that differ in their noise alone is linear in it.

    dv' = momentum dv + (H + gamma + decay) dx;  dx' = dx - r dv' + sqrt(r) noise (xi - xi'): noise that got into v
    would be carried by `momentum` into every later step.
    """
    steps, noise = 6, column(0.1, 2.0)
    problem, w = quadratics(2, D, steps), randn(2, D, seed=2)
    rule = entropy(entropy_steps=steps, entropy_noise=noise)
    one, other = (step_of(2, SHAPES, batches=steps, first_seed=seed) for seed in (0, 10))
    first, second = asked(rule, problem, w, one), asked(rule, problem, w, other)
    r, momentum, average, decay, gamma = (column(*INNER[key]) for key in INNER)
    dx, dv, dmu = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for batch in range(steps):
        torch.testing.assert_close(first.points[batch] - second.points[batch], dx, rtol=0, atol=1e-11)
        dv = momentum * dv + times(problem.hessians[batch], dx) + (gamma + decay) * dx
        dx = dx - r * dv + r.sqrt() * noise * (one.normal("entropy", batch) - other.normal("entropy", batch))
        dmu = average * dmu + (1 - average) * dx
    torch.testing.assert_close(first.found.grad - second.found.grad, -gamma * dmu, rtol=0, atol=1e-11)
    assert dmu.abs().min() > 0


@pytest.mark.parametrize("kind", ["number", "per model"])
def test_entropys_gamma_grows_up_to_its_largest(kind: str) -> None:
    """One step without average has mu = w - r grad, so that the gradient is gamma r grad."""
    problem, w = quadratics(2, D), randn(2, D, seed=2)
    gamma, growth, largest = (0.5, 0.01, 2.38) if kind == "number" else (column(0.5, 0.1), column(0.01, 0.1), 2.38)
    rule = part(
        "entropy",
        entropy_steps=1,
        entropy_gamma=gamma,
        entropy_scoping=growth,
        entropy_gamma_max=largest if kind == "number" else column(largest, 0.3),
        entropy_noise=0.0,
        entropy_average=0.0,
        entropy_weight_decay=0.0,
    )
    grad = problem.evaluate(w).grad
    for count in (0, 1, 11, 12, 100, 156, 157, 5000):
        found = asked(rule, problem, w, step_of(2, SHAPES, count=count)).found.grad / (0.1 * grad)
        expected = [min(0.5 * 1.01**count, 2.38)] * 2
        if kind == "per model":
            expected[1] = min(0.1 * 1.1**count, 0.3)
        torch.testing.assert_close(found, column(*expected).expand(2, D), rtol=1e-9, atol=0)
