"""Every optimizer of the listing: descent, rows, purity, seeds, state; and the names that compose none."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from tests.optimizers.conftest import FLOAT, Logistic, Problem, Quadratics, Run, keys_of, quadratics, randn, settings_of
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.optimizers.compose import Composed
from flatmin.plugins import listing, optimizer_names, optimizer_parts

NAMES = optimizer_names()
MODELS, SHAPES = 4, [(2, 3, 2), (3, 2), (2,)]
D = 20


def varied(name: str) -> list[dict[str, Any]]:
    """Return settings of models that differ in every number that may differ within a stack."""
    arguments = {key: argument for part in optimizer_parts(name) for key, argument in part.arguments.items()}
    own = []
    for k in range(MODELS):
        changes: dict[str, Any] = {
            key: (0.4 + 0.15 * k) * one.default for key, one in arguments.items() if one.setting.per_model
        }
        changes |= {"lr": 0.01 * (k + 1), "weight_decay": 0.01 * k, "entropy_noise": 0.1 + 0.1 * k}
        changes |= {"lpf_gamma": 0.02 * (k + 1), "lpf_increase": 1.0 + k, "smoothout_radius": 0.1 * (k + 1)}
        changes |= {"lpf_batches": 3, "entropy_steps": 2, "hessian_samples": 2, "hessian_every": 2, "scrn_steps": 4}
        changes |= {"nesterov": True}
        defaults = {key: one.default for key, one in arguments.items()}
        own.append(defaults | {key: value for key, value in changes.items() if key in arguments})
    return own


def stack(name: str, seeds: Sequence[int] = tuple(range(MODELS))) -> Run:
    """Return models with settings of their own, far from and close to their minima: both of SCRN's cases."""
    run = copy.copy(_stack(name))
    run.keys = keys_of(seeds)
    return run


@cache
def _stack(name: str) -> Run:
    settings = varied(name)
    problem = quadratics(MODELS, D, batches_of(name, settings[0]))
    away = torch.tensor([[3.0], [0.1], [0.3], [2.0]], dtype=FLOAT)
    return Run(name, settings, problem, problem.centres[0] + away * randn(MODELS, D, seed=7), shapes=SHAPES)


def mild(name: str) -> dict[str, Any]:
    """Return settings for convex problems that do not change over training.

    A neighbourhood of fixed size keeps the iterates off the minimum by as much, so it is a small one.
    """
    settings = settings_of(name)
    changes = {"lr": 0.1, "rho": 0.05, "entropy_scoping": 0.0}
    return settings | {key: value for key, value in changes.items() if key in settings}


def batches_of(name: str, settings: Mapping[str, Any]) -> int:
    return Composed(optimizer_parts(name), settings).rule.batches


def same(a: Run, b: Run) -> bool:
    return torch.equal(a.params, b.params) and all(torch.equal(a.state[key], b.state[key]) for key in a.state)


@pytest.mark.parametrize("convex", ["quadratic", "logistic"])
@pytest.mark.parametrize("name", NAMES)
def test_descends_on_a_convex_problem(name: str, convex: str) -> None:
    models, d = 3, 6
    settings = mild(name)
    batches = batches_of(name, settings)
    problem: Problem
    if convex == "quadratic":
        one = quadratics(models, d)
        problem = Quadratics(one.hessians.expand(batches, -1, -1, -1), one.centres.expand(batches, -1, -1), [1.0] * 9)
    else:
        x = randn(1, models, 12, d) + torch.linspace(-1, 2, d, dtype=FLOAT)
        problem = Logistic(x.expand(batches, -1, -1, -1), [1.0] * 9)
    run = Run(name, [settings] * models, problem, 2 * randn(models, d, seed=5))
    least = _least(problem, run.params)
    before = problem.evaluate(run.params).losses - least
    after = problem.evaluate(run.go(100).params).losses - least
    assert (after < 0.02 * before).all()


def _least(problem: Problem, params: Tensor) -> Tensor:
    """Return the least loss of each model, by Newton's method."""
    for _ in range(30):
        found = problem.evaluate(params)
        assert found.hvp is not None
        units = torch.eye(params.shape[1], dtype=FLOAT)
        hessian = torch.stack([found.hvp(unit.expand_as(params)) for unit in units], dim=2)
        params = params - torch.linalg.solve(hessian, found.grad)
    found = problem.evaluate(params)
    assert (found.grad.norm(dim=1) < 1e-10).all()
    return found.losses


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_a_stack_is_what_it_is_alone(name: str) -> None:
    together = stack(name).go(12)
    for k in range(MODELS):
        alone = stack(name)
        alone.select(torch.tensor([k]))
        alone.go(12)
        torch.testing.assert_close(alone.params[0], together.params[k], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_diverges_leaves_the_others_bit_for_bit(name: str) -> None:
    well, ill = stack(name), stack(name)
    ill.params = ill.params.clone()
    ill.params[2] = torch.nan
    well.go(5)
    ill.go(5)
    others = [0, 1, 3]
    assert torch.equal(well.params[others], ill.params[others])
    assert not torch.isfinite(ill.params[2]).any()


@pytest.mark.parametrize("name", NAMES)
def test_selecting_rows_in_the_middle_goes_on_as_before(name: str) -> None:
    whole, half = stack(name).go(3), stack(name).go(3)
    index = torch.tensor([3, 1])
    half.select(index)
    torch.testing.assert_close(half.go(4).params, whole.go(4).params[index], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_step_is_given_is_left_bit_for_bit(name: str) -> None:
    run = stack(name)
    for _ in range(3):
        params, state, composed = run.params, run.state, run.optimizer.composed
        given = [params, *state.values()]
        given += [value for own in (composed.rule, composed.base) for value in vars(own).values() if _is_tensor(value)]
        kept = [value.clone() for value in given]
        run.go()
        assert run.params is not params
        assert all(torch.equal(value, before) for value, before in zip(given, kept, strict=True))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_left_bit_for_bit(name: str) -> None:
    """A GradScaler, or who logs gradients, still holds them after the step."""
    run = stack(name)
    evaluate, kept = run.problem.evaluate, []

    class Keeping:
        sizes = run.problem.sizes

        def evaluate(self, params: Tensor, batch: int = 0) -> Any:
            found = evaluate(params, batch)
            kept.extend([(found.grad, found.grad.clone()), (found.losses, found.losses.clone())])
            return found

        select = run.problem.select

    run.problem = Keeping()
    run.go(3)
    assert kept
    assert all(torch.equal(value, before) for value, before in kept)


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_are_those_at_the_first_weights_asked_about(name: str) -> None:
    run = stack(name).go(2)
    for _ in range(2):
        run.go()
        assert torch.equal(run.losses, run.answered[0].losses)
        assert run.losses.shape == (MODELS,)


@pytest.mark.parametrize("name", NAMES)
def test_seeds(name: str) -> None:
    """The same seeds give the same numbers; others give others, if and only if something is drawn."""
    first, again, other = stack(name).go(4), stack(name).go(4), stack(name, seeds=[7, 8, 9, 10]).go(4)
    assert same(first, again)
    draws = bool(first.drawn) or bool(first.go().drawn)
    other.go()
    assert [torch.equal(*rows) for rows in zip(first.params, other.params, strict=True)] == [not draws] * MODELS
    assert len(set(first.drawn)) == len(first.drawn)


@pytest.mark.parametrize("name", NAMES)
def test_noise_belongs_to_the_seed_and_not_to_the_place(name: str) -> None:
    """Of models that are alike, those with one seed are the same bit for bit."""
    run = stack(name)
    run.select(torch.ones(MODELS, dtype=torch.int64))
    run.keys = keys_of([5, 6, 5, 7])
    draws = bool(run.go(2).drawn) or bool(run.go().drawn)
    assert torch.equal(run.params[0], run.params[2])
    assert [torch.equal(run.params[0], run.params[k]) for k in (1, 3)] == [not draws] * 2


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_another_one_in_each_step(name: str) -> None:
    """The same step taken as the first and as the third, with settings that do not change over training."""
    settings = mild(name)
    problem = quadratics(2, D, batches_of(name, settings))
    early = Run(name, [settings] * 2, problem, problem.centres[0] + 0.1 * randn(2, D, seed=7))
    late = copy.copy(early)
    late.count = 2
    early.go()
    late.go()
    assert [torch.equal(*rows) for rows in zip(early.params, late.params, strict=True)] == [not early.drawn] * 2


@pytest.mark.parametrize("name", NAMES)
def test_the_state_has_the_model_axis_first(name: str) -> None:
    run = stack(name)
    parts = [plugin.name for plugin in optimizer_parts(name)]
    fresh = {key: (value.shape, value.dtype) for key, value in run.state.items()}
    for shape, dtype in fresh.values():
        assert shape in ((MODELS, D), (MODELS, 1))
        assert dtype.is_floating_point
    assert all(key.partition("/")[0] in parts for key in fresh)
    run.go(3)
    assert {key: (value.shape, value.dtype) for key, value in run.state.items()} == fresh
    assert all(value.isfinite().all() for value in run.state.values())


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_saved_weights_state_and_count_bit_for_bit(name: str) -> None:
    """All that a step depends on is in there: nothing is kept in the rule or the base."""
    whole = stack(name).go(3)
    saved = io.BytesIO()
    torch.save({"params": whole.params, "state": dict(whole.state), "count": whole.count}, saved)
    whole.go(4)
    saved.seek(0)
    resumed = _stack.__wrapped__(name)
    for key, value in torch.load(saved, weights_only=True).items():
        setattr(resumed, key, value)
    assert same(resumed.go(4), whole)


def test_every_rule_goes_with_every_base_or_is_refused_with_the_reason() -> None:
    plugins = listing("optimizer").values()
    bases = [plugin.name for plugin in plugins if plugin.returns in ("Base", "SecondOrderBase")]
    rules = [plugin.name for plugin in plugins if plugin.returns in ("Rule", "FirstOrderRule")]
    assert len(bases) + len(rules) == len(plugins)
    pairs = {f"{rule}-{base}" for rule in rules for base in bases}
    refused = pairs - set(NAMES)
    assert refused == {"entropy-adahessian", "entropy-scrn"}
    assert sorted(NAMES) == sorted({*bases, *pairs} - refused)
    for name in NAMES:
        assert [plugin.name for plugin in optimizer_parts(name)] == name.split("-")
    for name in refused:
        with pytest.raises(RequestError, match=f"'{name}' makes no sense: "):
            optimizer_parts(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("samm-sgd", r"there is no optimizer 'samm-sgd'\. Did you mean 'sam-sgd'"),
        ("sdg", r"there is no optimizer 'sdg'\. Did you mean 'sgd'"),
        ("", "there is no optimizer ''"),
        ("sam-", "there is no optimizer 'sam-'"),
        ("-sgd", "there is no optimizer '-sgd'"),
        ("SGD", "there is no optimizer 'SGD'"),
        ("interface", "there is no optimizer 'interface'"),
        ("sam", "'sam' is a gradient rule and needs a base update: sam-.*sam-sgd"),
        ("sgd-sam", "'sgd-sam': the gradient rule comes first: 'sam-sgd'"),
        ("sam-vasso-sgd", "'sam-vasso-sgd' has 2 gradient rules; an optimizer takes one: 'sam-sgd'"),
        ("sgd-adam", "'sgd-adam' must have one base update, .*it has 'sgd' and 'adam'"),
        ("sam-sgd-adam", "'sam-sgd-adam' must have one base update, .*it has 'sam' and 'sgd' and 'adam'"),
        ("sam-lpf", "'sam-lpf' must have one base update, .*it has 'sam' and 'lpf'"),
        (
            "entropy-adahessian",
            "makes no sense: 'adahessian' multiplies by the Hessian .*'entropy' .*no Hessian-vector",
        ),
        ("entropy-scrn", "makes no sense: 'scrn' multiplies by the Hessian .*'entropy' .*no Hessian-vector"),
    ],
)
def test_a_name_that_composes_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        optimizer_parts(name)


def test_a_rule_alone_is_told_only_the_bases_that_it_goes_with() -> None:
    with pytest.raises(RequestError) as error:
        optimizer_parts("entropy")
    assert "entropy-sgd" in str(error.value)
    assert "entropy-scrn" not in str(error.value)
