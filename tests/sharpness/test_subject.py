"""Which examples and which loss a measure is asked of, and what drawing examples adds to its stderr."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import skew
from torch import Tensor, nn

from flatmin.errors import FlatminError, RequestError
from flatmin.labels import parse_label
from flatmin.sharpness import Engine, measure_stack
from flatmin.sharpness.losses import cross_entropy, squared_error
from flatmin.sharpness.subject import subject
from flatmin.sharpness.subsets import GROUPS
from flatmin.stack import Batch, StackedNetwork


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def noisy(examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network that fits a teacher's classes, a third of them random, and the examples."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = network(), torch.randn(examples, 4, dtype=torch.float64)
        y = (x @ torch.randn(4, 3, dtype=torch.float64)).argmax(dim=1)
        y = torch.where(torch.rand(examples) < 0.3, torch.randint(3, (examples,)), y)
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum((parameter.square().sum() for parameter in module.parameters()), torch.zeros(()))
        loss = nn.functional.cross_entropy(module(x), y) + 0.003 * decay
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return module, x, y


def copies(examples: int, count: int, *, cuts: int = 1) -> Engine:
    """Return an engine of copies of one model that differ in their streams alone."""
    module, x, y = noisy(examples)
    params, _ = StackedNetwork.stack([module] * count)
    parts = [
        Batch(part, label.expand(count, -1), shared=True)
        for part, label in zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True)
    ]
    return Engine(StackedNetwork(module), params, {}, parts, torch.arange(count))


def test_by_default_the_engine_itself_is_measured(mlp: Any) -> None:
    engine = mlp.engine()
    assert subject(engine) is engine
    assert subject(engine, loss="cross_entropy") is engine
    assert subject(engine, subset=64) is engine, "there are 23 examples"


def test_another_set(mlp: Any) -> None:
    whole = mlp.engine()
    test = [Batch(mlp.x[:9], mlp.y[:, :9], shared=True)]
    engine = Engine(whole.network, whole.params, {}, whole.batches, whole.keys, sets={"test": test})
    alone = Engine(whole.network, whole.params, {}, test, whole.keys)
    first, second = measure_stack(engine, ["lambda_max(data=test)", "lambda_max"])
    assert [row["value"] for row in first] == [row["value"] for row in measure_stack(alone, ["lambda_max"])[0]]
    assert [row["value"] for row in second] == [row["value"] for row in measure_stack(whole, ["lambda_max"])[0]]
    one = engine.select(torch.tensor([3]))
    assert measure_stack(one, ["lambda_max(data=test)"])[0][0]["value"] == pytest.approx(first[3]["value"], rel=1e-9)
    with pytest.raises(FlatminError, match=r"lpf\(data=val\) failed: there is no 'val' set.*there are: train, test"):
        measure_stack(engine, ["lpf(data=val)"])


def test_other_losses(problem: Any) -> None:
    engine = problem.engine((5,))
    smoothed, squared = subject(engine, label_smoothing=0.2), subject(engine, loss="squared_error")
    for k in range(len(engine)):
        outputs = problem.modules[k].eval()(problem.x)
        expected = nn.functional.cross_entropy(outputs, problem.y[k], label_smoothing=0.2)
        assert smoothed.losses()[k].item() == pytest.approx(expected.item(), rel=1e-12)
        one_hot = nn.functional.one_hot(problem.y[k], 3).double()
        assert squared.losses()[k].item() == pytest.approx(nn.functional.mse_loss(outputs, one_hot).item(), rel=1e-12)
    assert engine.loss is cross_entropy
    with pytest.raises(RequestError, match="label_smoothing goes with a cross-entropy"):
        subject(engine, loss="squared_error", label_smoothing=0.1)
    with pytest.raises(RequestError, match="label_smoothing goes with a cross-entropy"):
        subject(engine.with_loss(squared_error), label_smoothing=0.1)


def test_a_measure_may_not_declare_what_all_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greedy_measure.py").write_text(
        "def greedy(engine, *, data: str = 'train') -> Estimate:\n    'Greedy.'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    point = metadata.EntryPoint("greedy", "greedy_measure:greedy", "flatmin.measures")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    with pytest.raises(RequestError, match="the measure 'greedy' declares 'data', which every measure takes already"):
        parse_label("greedy")


def test_labels_keep_their_form() -> None:
    assert parse_label("lpf(data=train, loss=own, label_smoothing=0)").label == "lpf"
    assert parse_label("lpf(subset=2000, sigma=0.1, data=test)").label == "lpf(data=test, sigma=0.1, subset=2000)"
    assert parse_label("lpf(subset=200, subset_stratified=false)").label == "lpf(subset=200)"
    with pytest.raises(RequestError, match="'subset' is given twice"):
        parse_label("lpf(subset=100, subset=200)")
    with pytest.raises(RequestError, match=r"eps_sharpness does not take 'subset': near a minimum"):
        parse_label("eps_sharpness(subset=100)")
    with pytest.raises(RequestError, match="subset = 63: should be greater than or equal to 64"):
        parse_label("lpf(subset=63)")


def test_what_goes_with_a_refused_subset_is_refused_too() -> None:
    with pytest.raises(RequestError, match=r"margin does not take 'subset_stratified': it takes one pass"):
        parse_label("margin(subset_stratified=true)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("l2_norm(metric=filter)", r"l2_norm does not take 'metric'\. It takes no arguments\."),
        (
            "gradient_norm(substet=100)",
            r"gradient_norm does not take 'substet'\. Valid: data, label",
        ),
        ("LPF", r"there is no measure 'LPF'\. Did you mean 'lpf'\?"),
        ("lambda-max(metric=identity)", r"is not a measure; .*\. Did you mean 'lambda_max'\?"),
        ("lpf(sigma=0.1", r"is not a measure; write `lpf` or `lpf\(sigma=0\.002\)`$"),
    ],
)
def test_only_what_a_measure_takes_is_offered(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse_label(text)


@pytest.mark.parametrize("same_key", [True, False])
def test_a_sample_is_drawn_without_replacement_by_the_models_key(same_key: bool) -> None:
    engine = copies(200, 3, cuts=3)
    engine.keys = torch.tensor([7, 7, 7] if same_key else [7, 8, 7])
    sample, more = engine.sample(70), engine.sample(150)
    assert (sample.n_examples, sample.population, sample.is_subset) == (70, 200, True)
    assert sample.batches[0].shared is same_key
    losses = engine.per_example(engine.loss)
    found, larger = sample.per_example(sample.loss), more.per_example(more.loss)
    for k in range(3):
        drawn, everything = ({round(loss, 9) for loss in row.tolist()} for row in (found[k], losses[k]))
        assert drawn <= everything
        assert len(drawn) == 70
        assert torch.allclose(larger[k, :70], found[k], rtol=1e-12), "a larger sample holds a smaller one"
    assert torch.allclose(found[0], found[2])
    assert bool((found[0] != found[1]).any()) is not same_key
    alone = engine.select(torch.tensor([1])).sample(70)
    assert torch.allclose(alone.per_example(alone.loss)[0], found[1], rtol=1e-12)


@pytest.mark.parametrize("memory", [0, 2**31], ids=["one by one", "at once"])
def test_groups_are_the_sample_cut_up(memory: int) -> None:
    engine = copies(200, 3, cuts=2)
    engine.memory = memory
    sample = engine.sample(100)
    made = list(sample.groups(8))
    assert len(made) == (8 if memory == 0 else 1)
    means = torch.cat([group.losses() for group in made]).reshape(8, 3)
    single = sample.per_example(sample.loss)
    assert torch.allclose(means, single[:, :96].reshape(3, 8, 12).mean(dim=2).T, rtol=1e-12)
    assert all(torch.equal(group.keys, sample.keys.repeat(len(group) // 3)) for group in made)


def test_the_sampling_error_of_a_mean_is_that_of_survey_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatmin.sharpness.estimate import Estimate, exact

    def mean_loss(engine: Engine, **arguments: Any) -> Estimate:
        return exact(engine.losses(), passes=1.0)

    monkeypatch.setattr("flatmin.sharpness.lpf.lpf", mean_loss)
    engine = copies(400, 2)
    (rows,) = measure_stack(engine, ["lpf(subset=160)"])
    single = engine.sample(160).per_example(engine.loss)
    means, wider = single.reshape(2, GROUPS, 10).mean(dim=2), 2.131450 / 1.959964  # Student's t of 15, normal: 97.5 %
    for row, of_groups in zip(rows, means, strict=True):
        error = (of_groups.var() / GROUPS * (1 - 160 / 400)).sqrt().item()
        excess = max(0.0, float(skew(of_groups)) ** 2 - 6 * 14 / (17 * 19))
        assert row["stderr"] == pytest.approx(wider * (1 + 1.08039 * excess / 16) * error, rel=1e-5)
        assert row["passes"] == pytest.approx(2 * 160 / 400)
        assert row["converged"] == (row["stderr"] <= 0.02 * row["value"]), "of the whole stderr"


def test_an_undefined_group_leaves_no_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatmin.sharpness.estimate import Estimate, exact

    def fragile(engine: Engine, **arguments: Any) -> Estimate:
        losses = engine.losses()
        return exact(losses if engine.n_examples > 50 else losses.fill_(torch.nan), passes=1.0)

    monkeypatch.setattr("flatmin.sharpness.lpf.lpf", fragile)
    (rows,) = measure_stack(copies(200, 1), ["lpf(subset=100)"])
    assert rows[0]["value"] is not None
    assert (rows[0]["stderr"], rows[0]["converged"]) == (None, False)
