"""The gradient rules on quadratics, against closed forms and loops written out; SAM against pytorch_optimizer's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_optimizer import SAM
from scipy.stats import kstest
from tests.optimizers.conftest import (
    FLOAT,
    SHAPES,
    SIZES,
    D,
    Quadratics,
    Run,
    asked,
    column,
    part,
    quadratics,
    randn,
    same_for_all,
    settings_of,
    step_of,
    times,
)
from torch import Tensor, nn
from torch.nn import functional

from flatmin.errors import RequestError
from flatmin.optimizers import TorchOptimizer
from flatmin.optimizers.interface import Evaluation, Step
from flatmin.plugins import optimizer_names

BASES = [name for name in optimizer_names() if "-" not in name]


def test_sam_climbs_by_rho_along_the_gradient() -> None:
    problem, w = quadratics(3, D), randn(3, D, seed=2)
    rho = column(0.0, 0.1, 0.7)
    done = asked(part("sam", rho=rho), problem, w, step_of(3, SHAPES))
    g = times(problem.hessians[0], w - problem.centres[0])
    climbed = w + rho * g / g.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(done.points[1], climbed, rtol=0, atol=1e-12)
    torch.testing.assert_close(done.found.grad, g + times(problem.hessians[0], climbed - w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.5])
def test_asam_climbs_in_a_ball_scaled_by_each_weight(eta: float) -> None:
    problem, w = quadratics(3, D), randn(3, D, seed=2)
    w[:, ::4] = 0.0
    rho = column(0.1, 0.5, 2.0)
    done = asked(part("asam", rho=rho, asam_eta=eta), problem, w, step_of(3, SHAPES))
    g = times(problem.hessians[0], w - problem.centres[0])
    for k in range(3):
        size = [abs(float(own)) + eta for own in w[k]]
        length = math.sqrt(sum((t * float(one)) ** 2 for t, one in zip(size, g[k], strict=True)))
        climbed = [
            float(own) + float(rho[k]) * t**2 * float(one) / length
            for own, t, one in zip(w[k], size, g[k], strict=True)
        ]
        torch.testing.assert_close(done.points[1][k], torch.tensor(climbed, dtype=FLOAT), rtol=0, atol=1e-12)
    there = times(problem.hessians[0], done.points[1] - problem.centres[0])
    torch.testing.assert_close(done.found.grad, there, rtol=0, atol=1e-12)


def test_asams_ascent_scales_with_the_weights() -> None:
    """Kwon et al.'s reason for it: the neighbourhood of A w is A times that of w, where L(A w) = L(w)."""
    problem, w, scale = quadratics(1, D), randn(1, D, seed=2), randn(1, D, seed=3).abs() + 0.1
    scaled = Quadratics(problem.hessians / scale[0] / scale[0][:, None], problem.centres * scale, problem.sizes)
    rule, step = part("asam", asam_eta=0.0), step_of(1, SHAPES)
    here = asked(rule, problem, w, step).points[1]
    torch.testing.assert_close(asked(rule, scaled, scale * w, step).points[1], scale * here, rtol=1e-11, atol=0)


@pytest.mark.parametrize("rule", ["sam", "asam", "vasso"])
def test_without_a_gradient_there_is_no_ascent(rule: str) -> None:
    problem = quadratics(2, D)
    done = asked(part(rule), problem, problem.centres[0], step_of(2, SHAPES))
    assert torch.equal(done.points[1], problem.centres[0])
    assert (done.found.grad == 0).all()


def test_vassos_ascent_follows_the_weighted_sum_of_all_gradients() -> None:
    """After t steps d = (1 - theta)^t g_0 + sum over i = 1 .. t of theta (1 - theta)^(t - i) g_i."""
    theta, rho, steps = column(0.1, 0.4, 0.9), column(0.05, 0.5, 1.0), 8
    rule, state, gradients = part("vasso", theta=theta, rho=rho), None, []
    for t in range(steps):
        problem, w = quadratics(3, D, seed=10 + t), randn(3, D, seed=30 + t)
        done = asked(rule, problem, w, step_of(3, SHAPES, count=t), state)
        state = done.state
        gradients.append(times(problem.hessians[0], w - problem.centres[0]))
        d = (1 - theta) ** t * gradients[0]
        for i in range(1, t + 1):
            d = d + theta * (1 - theta) ** (t - i) * gradients[i]
        climbed = w + rho * d / d.square().sum(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(done.points[1], climbed, rtol=0, atol=1e-12)
        there = times(problem.hessians[0], climbed - problem.centres[0])
        torch.testing.assert_close(done.found.grad, there, rtol=0, atol=1e-11)


@pytest.mark.parametrize("base", BASES)
def test_vasso_with_theta_one_is_sam_bit_for_bit(base: str) -> None:
    problem, w = quadratics(3, 6), randn(3, 6, seed=2)
    sam = Run(f"sam-{base}", [settings_of(f"sam-{base}", rho=0.1)] * 3, problem, w)
    vasso = Run(f"vasso-{base}", [settings_of(f"vasso-{base}", rho=0.1, theta=1.0)] * 3, problem, w)
    for _ in range(20):
        assert torch.equal(sam.go().params, vasso.go().params)


NOTHING: Mapping[str, Mapping[str, Any]] = {
    "sam": {"rho": 0.0},
    "asam": {"rho": 0.0},
    "vasso": {"rho": 0.0},
    "lpf": {"lpf_gamma": 0.0},
    "smoothout": {"smoothout_radius": 0.0},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", NOTHING)
def test_a_rule_whose_neighbourhood_is_a_point_is_the_plain_gradient_bit_for_bit(rule: str, base: str) -> None:
    name, problem, w = f"{rule}-{base}", quadratics(3, 6), randn(3, 6, seed=2)
    plain = Run(base, [settings_of(base)] * 3, problem, w)
    ruled = Run(name, [settings_of(name, **NOTHING[rule])] * 3, problem, w)
    assert torch.equal(plain.go(20).params, ruled.go(20).params)


def norms(w: Tensor, scale: str) -> Tensor:
    """Return, for weights `[d]`, what each element's noise is in proportion to, filter by filter."""
    expected = []
    for own, shape in zip(torch.split(w, SIZES), SHAPES, strict=True):
        tensor = own.reshape(shape)
        for index in range(own.numel()):
            if scale == "absolute":
                norm = torch.ones((), dtype=FLOAT)
            elif scale == "filter" and len(shape) > 1:
                norm = tensor[index // math.prod(shape[1:])].square().sum().sqrt()
            else:
                norm = tensor.square().sum().sqrt()
            expected.append(norm)
    return torch.stack(expected)


def assert_moments(sample: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Compare a sample `[n, d]` with the mean and covariance it is of, within 4 and 5 standard errors.

    The standard errors of the covariance are those of a Gaussian sample; flatter noise has smaller ones.
    """
    n, variances = len(sample), covariance.diagonal()
    assert ((sample.mean(dim=0) - mean).abs() < 4 * (variances / n).sqrt()).all()
    found, error = torch.cov(sample.T), ((torch.outer(variances, variances) + covariance**2) / n).sqrt()
    assert ((found - covariance).abs() < 5 * error).all()
    error_of_trace = (2 * covariance.square().sum() / n).sqrt()
    assert (found.trace() - covariance.trace()).abs() < 4 * error_of_trace


@pytest.mark.parametrize("scale", ["filter", "tensor", "absolute"])
def test_lpfs_gradient_has_the_mean_and_covariance_of_the_filtered_loss(scale: str) -> None:
    """On a quadratic it is H (w + e - c): its mean is the gradient at w, its covariance gamma^2 H S^2 H."""
    models, gamma = 4000, 0.3
    one, w = quadratics(1, D), randn(1, D, seed=2)
    rule = part("lpf", lpf_gamma=gamma, lpf_noise=scale)
    done = asked(rule, same_for_all(one, models), w.expand(models, -1), step_of(models, SHAPES))
    h, s = one.hessians[0, 0], norms(w[0], scale)
    assert_moments(done.points[0], w[0], gamma**2 * torch.diag(s**2))
    assert_moments(done.found.grad, h @ (w - one.centres[0])[0], gamma**2 * h @ torch.diag(s**2) @ h)


@pytest.mark.parametrize("scale", ["filter", "tensor", "absolute"])
def test_smoothouts_noise_is_uniform_around_the_weights(scale: str) -> None:
    models, a = 4000, 0.3
    one, w = quadratics(1, D), randn(1, D, seed=2)
    rule = part("smoothout", smoothout_radius=a, smoothout_noise=scale)
    done = asked(rule, same_for_all(one, models), w.expand(models, -1), step_of(models, SHAPES))
    h, s = one.hessians[0, 0], norms(w[0], scale)
    unit = (done.points[0] - w) / (a * s)
    assert (unit.abs() <= 1 + 1e-12).all()
    assert kstest(unit.flatten().numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3
    assert_moments(done.points[0], w[0], a**2 / 3 * torch.diag(s**2))
    assert_moments(done.found.grad, h @ (w - one.centres[0])[0], a**2 / 3 * h @ torch.diag(s**2) @ h)


@pytest.mark.parametrize(("rule", "radius"), [("lpf", "lpf_gamma"), ("smoothout", "smoothout_radius")])
def test_noise_has_a_size_of_each_model_and_another_draw_in_each_step(rule: str, radius: str) -> None:
    problem, w, sizes = same_for_all(quadratics(1, D), 3), randn(1, D, seed=2).expand(3, -1), column(0.0, 0.1, 0.4)
    first, second = (
        [asked(part(rule, **{radius: size}), problem, w, step_of(3, SHAPES, count=count)).points[0] - w]
        for count, size in ((0, sizes), (1, sizes))
    )
    unit = asked(part(rule, **{radius: 1.0}), problem, w, step_of(3, SHAPES)).points[0] - w
    torch.testing.assert_close(first[0], sizes * unit, rtol=0, atol=1e-14)
    assert (first[0][1:] - second[0][1:]).abs().min() > 0
    cosine = functional.cosine_similarity(first[0][1:], second[0][1:], dim=1)
    assert (cosine.abs() < 4 / math.sqrt(D)).all()


@pytest.mark.parametrize("name", ["lpf-sgd", "smoothout-sgd", "sam-sgd", "asam-sgd", "vasso-sgd"])
def test_momentum_and_weight_decay_act_at_the_weights_in_front_of_the_step(name: str) -> None:
    """Where the gradient is zero everywhere, nothing but weight decay moves the weights: no drift."""
    flat = Quadratics(torch.zeros(1, 2, D, D, dtype=FLOAT), torch.zeros(1, 2, D, dtype=FLOAT), [1.0])
    settings = settings_of(name, lr=0.5, momentum=0.0, weight_decay=0.25)
    settings |= {key: 1.0 for key in ("rho", "lpf_gamma", "smoothout_radius") if key in settings}
    w = randn(2, D)
    run = Run(name, [settings, {**settings, "weight_decay": 0.0}], flat, w, shapes=SHAPES).go(30)
    torch.testing.assert_close(run.params[0], w[0] * (1 - 0.5 * 0.25) ** 30, rtol=1e-13, atol=0)
    assert torch.equal(run.params[1], w[1])


@pytest.mark.parametrize("sizes", [[4.0, 4.0, 4.0], [5.0, 5.0, 2.0], [3.0, 1.0]])
def test_lpfs_micro_batches_weigh_by_their_examples_and_have_noise_of_their_own(sizes: Sequence[float]) -> None:
    """An epoch's last batch may be too small for all of them."""
    problem, w, gamma = quadratics(2, D, len(sizes), sizes=sizes), randn(2, D, seed=2), column(0.1, 0.3)
    step = step_of(2, SHAPES, batches=len(sizes))
    done = asked(part("lpf", lpf_gamma=gamma, lpf_batches=3, lpf_noise="absolute"), problem, w, step)
    grad, losses = torch.zeros_like(w), torch.zeros(2, dtype=FLOAT)
    for batch, examples in enumerate(sizes):
        found = problem.evaluate(w + gamma * step.normal("lpf", batch), batch)
        grad += examples * found.grad
        losses += examples * found.losses
    torch.testing.assert_close(done.found.grad, grad / sum(sizes), rtol=0, atol=1e-12)
    torch.testing.assert_close(done.found.losses, losses / sum(sizes), rtol=0, atol=1e-12)
    assert len(done.points) == len(sizes)


def test_lpfs_hessian_is_that_of_its_micro_batches_together() -> None:
    sizes = [5.0, 5.0, 2.0]
    problem, w = quadratics(2, D, 3, sizes=sizes), randn(2, D, seed=2)
    step, v = step_of(2, SHAPES, batches=3), randn(2, D, seed=3)
    hessian = Step(0, None, 1.0, 3, True, step.streams, SHAPES, FLOAT)
    hvp = asked(part("lpf", lpf_gamma=0.1, lpf_batches=3), problem, w, hessian).found.hvp
    assert hvp is not None
    expected = torch.stack([n / 12 * times(h, v) for n, h in zip(sizes, problem.hessians, strict=True)]).sum(dim=0)
    torch.testing.assert_close(hvp(v), expected, rtol=0, atol=1e-12)


class Quartics:
    sizes = (1.0,)

    def evaluate(self, params: Tensor, batch: int = 0) -> Evaluation:
        return Evaluation((params**4 / 12).sum(dim=1), params**3 / 3, lambda v: params**2 * v)

    def select(self, index: Tensor) -> Quartics:
        return self


@pytest.mark.parametrize("rule", ["sam", "asam", "vasso", "lpf", "smoothout"])
def test_the_hessian_that_a_rule_returns_is_at_the_weights_of_its_gradient(rule: str) -> None:
    """On a loss whose Hessian changes: sum of w^4 / 12, with gradient w^3 / 3 and Hessian w^2."""
    step = Step(0, None, 1.0, 1, True, step_of(2, SHAPES).streams, SHAPES, FLOAT)
    found = asked(part(rule), Quartics(), randn(2, D), step).found
    assert found.hvp is not None
    curvature = found.hvp(torch.ones(2, D, dtype=FLOAT))
    torch.testing.assert_close(curvature, (3 * found.grad.abs()) ** (2 / 3), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["number", "per model"])
def test_lpfs_noise_grows_along_half_a_cosine(kind: str) -> None:
    problem, w, total = quadratics(2, D), randn(2, D, seed=2), 40
    gamma, increase = (0.2, 15.0) if kind == "number" else (column(0.2, 0.1), column(15.0, 1.0))
    rule = part("lpf", lpf_gamma=gamma, lpf_increase=increase, lpf_noise="absolute")
    quarter = (1 - math.cos(math.pi / 4)) / 2
    first, last = ((1 - math.cos(math.pi * t / 40)) / 2 for t in (1, 39))
    for count, share in {0: 0, 1: first, 10: quarter, 20: 0.5, 39: last, 40: 1, 60: 1}.items():
        end: Any = total if kind == "number" else column(total, total)
        step = step_of(2, SHAPES, count=count, total=end)
        displaced = w + gamma * (1 + (increase - 1) * share) * step.normal("lpf", 0)
        torch.testing.assert_close(asked(rule, problem, w, step).points[0], displaced, rtol=0, atol=1e-13)


def test_lpfs_growing_noise_needs_to_know_the_end() -> None:
    with pytest.raises(RequestError, match="total_steps"):
        asked(part("lpf", lpf_increase=2.0), quadratics(1, D), randn(1, D), step_of(1, SHAPES))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6, dtype=FLOAT), nn.Linear(6, 3, dtype=FLOAT)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.hidden(x)))
        return scores


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_and_asam_equal_pytorch_optimizer(adaptive: bool, nesterov: bool) -> None:
    """40 steps of a small network on batches, over SGD with momentum and weight decay."""
    sgd: dict[str, Any] = {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.01, "nesterov": nesterov}
    rho = 0.7 if adaptive else 0.1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mine = Perceptron()
    peers = Perceptron()
    peers.load_state_dict(mine.state_dict())
    start = nn.utils.parameters_to_vector(mine.parameters()).detach().clone()
    extra: dict[str, Any] = {"asam_eta": 0.0} if adaptive else {}
    ours = TorchOptimizer("asam-sgd" if adaptive else "sam-sgd", mine, rho=rho, **sgd, **extra)
    theirs = SAM(peers.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, **sgd)
    for step in range(40):
        x, y = randn(10, 4, seed=step), torch.randint(3, (10,), generator=torch.Generator().manual_seed(step))

        ours.step(partial(_backward, mine, x, y))
        theirs.zero_grad()
        _backward(peers, x, y)
        theirs.step(partial(_backward, peers, x, y))
        mine_now, theirs_now = map(nn.utils.parameters_to_vector, (mine.parameters(), peers.parameters()))
        torch.testing.assert_close(mine_now, theirs_now, rtol=0, atol=1e-7)  # theirs rounds the norm to float32
    assert (mine_now - start).norm() > 1


def _backward(network: nn.Module, x: Tensor, y: Tensor) -> Any:
    loss = functional.cross_entropy(network(x), y)
    torch.autograd.backward(loss)
    return loss
