"""Every optimizer of the listing: against torch, on convex problems, by rows, and in composition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.optimizers.compose import Optimizer
from flatmin.plugins import listing, optimizer_parts

BASES = sorted(name for name, plugin in listing("optimizer").items() if plugin.returns == "Base")
RULES = sorted(name for name, plugin in listing("optimizer").items() if plugin.returns == "Rule")
NAMES = BASES + [f"{rule}-{base}" for rule in RULES for base in BASES]


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    defaults = {key: argument.default for part in optimizer_parts(name) for key, argument in part.arguments.items()}
    return {**defaults, **changes}


def quadratic(k: int, d: int, seed: int = 0) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Return starting weights `[k, d]` and the loss and gradient of random convex quadratics."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(k, d, d, generator=generator, dtype=torch.float64)
    hessian = factor @ factor.mT / d + 0.1 * torch.eye(d, dtype=torch.float64)

    def loss_and_grad(params: Tensor) -> tuple[Tensor, Tensor]:
        product = torch.einsum("kij,kj->ki", hessian, params)
        return 0.5 * (params * product).sum(1), product

    return torch.randn(k, d, generator=generator, dtype=torch.float64), loss_and_grad


def run(
    name: str, settings: list[dict[str, Any]], params: Tensor, oracle: Any, steps: int, factor: float = 1.0
) -> Tensor:
    optimizer = Optimizer(name, settings, params)
    state = optimizer.init(params)
    lr_factor = torch.full((len(params), 1), factor, dtype=params.dtype)
    for _ in range(steps):
        _, params, state = optimizer.step(params, state, lr_factor, oracle)
    return params


TORCH: Mapping[str, Any] = {
    "sgd": lambda w, s: torch.optim.SGD(
        w, lr=s["lr"], momentum=s["momentum"], weight_decay=s["weight_decay"], nesterov=s["nesterov"]
    ),
    "adam": lambda w, s: torch.optim.Adam(
        w, lr=s["lr"], betas=(s["beta1"], s["beta2"]), eps=s["adam_eps"], weight_decay=s["weight_decay"]
    ),
    "adamw": lambda w, s: torch.optim.AdamW(
        w, lr=s["lr"], betas=(s["beta1"], s["beta2"]), eps=s["adam_eps"], weight_decay=s["weight_decay"]
    ),
}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", sorted(TORCH))
def test_base_equals_torch(name: str, nesterov: bool) -> None:
    """100 steps of five models with five settings equal torch's own optimizer, one model at a time."""
    params, oracle = quadratic(5, 6)
    own = [settings_of(name, lr=0.01 * (k + 1), weight_decay=0.02 * k) for k in range(5)]
    if name == "sgd":
        own = [{**one, "momentum": 0.2 * k, "nesterov": nesterov and k > 0} for k, one in enumerate(own)]
        if nesterov:
            params, own = params[1:], own[1:]
            whole = oracle

            def oracle(rows: Tensor) -> tuple[Tensor, Tensor]:
                losses, grads = whole(torch.cat([rows[:1], rows]))
                return losses[1:], grads[1:]

    ours = run(name, own, params, oracle, 100)
    for k, one in enumerate(own):
        w = params[k].clone().requires_grad_()
        theirs = TORCH[name]([w], one)
        for _ in range(100):
            rows = params.clone()
            rows[k] = w.detach()
            w.grad = oracle(rows)[1][k]
            theirs.step()
        torch.testing.assert_close(ours[k], w.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_descends_on_a_convex_problem(name: str) -> None:
    params, oracle = quadratic(3, 8)
    before = oracle(params)[0]
    after = oracle(run(name, [settings_of(name, lr=0.05)] * 3, params, oracle, 300))[0]
    assert (after < 0.05 * before).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_mix_and_inputs_are_left_alone(name: str) -> None:
    params, oracle = quadratic(4, 5)
    kept = params.clone()
    own = [settings_of(name, lr=0.01 * (k + 1)) for k in range(4)]
    together = run(name, own, params, oracle, 20)
    assert torch.equal(params, kept)
    for k in range(4):
        alone = run(name, [own[k]], params[k : k + 1], lambda row, k=k: _row(oracle, params, row, k), 20)
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=1e-12)


def _row(oracle: Any, params: Tensor, row: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = params.clone()
    rows[k] = row[0]
    losses, grads = oracle(rows)
    return losses[k : k + 1], grads[k : k + 1]


@pytest.mark.parametrize("name", NAMES)
def test_selecting_rows_goes_on_as_before(name: str) -> None:
    """A stack that shrinks in the middle takes the same steps as one that does not."""
    params, oracle = quadratic(4, 5)
    own = [settings_of(name, lr=0.01 * (k + 1)) for k in range(4)]
    ones = torch.ones(4, 1, dtype=torch.float64)
    whole = Optimizer(name, own, params)
    state = whole.init(params)
    for _ in range(3):
        _, params, state = whole.step(params, state, ones, oracle)
    index = torch.tensor([3, 1])
    half, half_state = whole.select(index), {key: value[index] for key, value in state.items()}
    _, expected, _ = whole.step(params, state, ones, oracle)

    def half_oracle(rows: Tensor) -> tuple[Tensor, Tensor]:
        filled = params.clone()
        filled[index] = rows
        losses, grads = oracle(filled)
        return losses[index], grads[index]

    _, ours, _ = half.step(params[index], half_state, ones[:2], half_oracle)
    torch.testing.assert_close(ours, expected[index], rtol=0, atol=1e-12)


def test_sam_takes_the_gradient_at_the_closed_form_ascent_point() -> None:
    params, oracle = quadratic(3, 6)
    _, g = oracle(params)
    rho = torch.tensor([[0.0], [0.1], [0.7]], dtype=torch.float64)
    ascent = params + rho * g / g.norm(dim=1, keepdim=True)
    expected = params - 0.3 * oracle(ascent)[1]
    own = [settings_of("sam-sgd", lr=0.3, momentum=0.0, rho=float(r)) for r in rho[:, 0]]
    torch.testing.assert_close(run("sam-sgd", own, params, oracle, 1), expected, rtol=0, atol=1e-10)


def test_names_that_compose_nothing_are_refused() -> None:
    with pytest.raises(RequestError, match="Did you mean 'sam-sgd'"):
        optimizer_parts("samm-sgd")
    with pytest.raises(RequestError, match="is a gradient rule and needs a base update"):
        optimizer_parts("sam")
