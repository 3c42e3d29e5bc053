"""The spectrum of outputs and targets, against direct sums, numpy's transform and scikit-learn's components."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.sharpness import Engine, fourier, measure_all
from flatmin.sharpness.losses import PerExample, cross_entropy, squared_error
from flatmin.sharpness.principal import Examples, first_component
from flatmin.stack import Batch, StackedNetwork

Array = npt.NDArray[Any]
WAVES = {1: 0.25, 2: 0.5, 4: 0.75, 8: 1.0}


def engine(modules: list[nn.Module], x: Tensor, y: Tensor, loss: PerExample, **more: Any) -> Engine:
    """Return an engine whose examples, `[n, ...]` or `[K, n, ...]` with targets `[K, n, ...]`, lie in two batches."""
    params, buffers = StackedNetwork.stack([module.double() for module in modules])
    shared = len(x) == y.shape[1] and x.shape[:2] != y.shape[:2]
    cut = y.shape[1] // 3
    xs = (x[:cut], x[cut:]) if shared else (x[:, :cut], x[:, cut:])
    batches = [Batch(a, b, shared) for a, b in zip(xs, (y[:, :cut], y[:, cut:]), strict=True)]
    return Engine(StackedNetwork(modules[0]), params, buffers, batches, torch.arange(len(modules)), loss=loss, **more)


def curves(made: Engine, label: str = "fourier") -> list[dict[str, dict[float, float]]]:
    """Return the curves of each model by their part: values by x."""
    found: list[dict[str, dict[float, float]]] = []
    for of_model in measure_all(made, [label]).points[0]:
        found.append({})
        for point in of_model:
            found[-1].setdefault(json.loads(point["settings"])["part"], {})[point["x"]] = point["value"]
    return found


def direct(x: Array, y: Array, ks: Array) -> Array:
    """Return the coefficients of numbers `[n]` at places `[n]` by a plain sum."""
    return np.array([sum(b * np.exp(-2j * math.pi * k * a) for a, b in zip(x, y, strict=True)) for k in ks]) / len(x)


def scaled(x: Array) -> Array:
    """Return places `[n]` in [-1/2, 1/2), a gap short of the end."""
    places: Array = (x - x.min()) / ((x.max() - x.min()) * len(x) / (len(x) - 1)) - 0.5
    return places


def outputs(module: nn.Module, x: Tensor) -> Array:
    with torch.no_grad():
        made: Tensor = module(x)
    return made.numpy()


def networks(build: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return [build().double() for _ in range(count)]


def curve_network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.fixture
def draws() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.fixture
def waves(draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the places of a grid in any order, and the sum of four sines there."""
    x = torch.randperm(200, generator=draws, dtype=torch.float64)[:, None] / 200
    return x, sum((a * torch.sin(2 * math.pi * k * x) for k, a in WAVES.items()), torch.zeros_like(x))


def test_a_regression_is_the_plain_sum(draws: torch.Generator) -> None:
    """At places without order, of targets of each model's own."""
    modules = networks(curve_network)
    x = 3 + 5 * torch.rand(40, 1, generator=draws, dtype=torch.float64)
    y = torch.randn(3, 40, 1, generator=draws, dtype=torch.float64)
    made = engine(modules, x, y, squared_error)
    (rows,) = measure_all(made, ["fourier(frequencies=6)"]).rows
    for k, found in enumerate(curves(made, "fourier(frequencies=6)")):
        place = scaled(x[:, 0].numpy())
        ours, true = (
            direct(place, values, np.arange(7)) for values in (outputs(modules[k], x)[:, 0], y[k, :, 0].numpy())
        )
        twice = np.array([1, 2, 2, 2, 2, 2, 2])
        for part, expected in {
            "amplitude": twice * abs(ours),
            "ratio": abs(ours / true),
            "error": abs(ours - true) / abs(true),
        }.items():
            assert list(found[part]) == list(range(7))
            assert list(found[part].values()) == pytest.approx(expected, rel=1e-9)
        assert rows[k]["value"] == pytest.approx(np.mean(abs(ours - true) / abs(true)), rel=1e-9)


def test_a_grid_has_its_discrete_transform(waves: tuple[Tensor, Tensor]) -> None:
    """As published: |FFT| of the outputs in the order of x, over half the points; ratios at the four waves alone."""
    x, y = waves
    modules = networks(curve_network)
    order = x[:, 0].argsort()
    for k, found in enumerate(curves(engine(modules, x, y.expand(3, -1, -1), squared_error))):
        expected = abs(np.fft.fft(outputs(modules[k], x[order])[:, 0])) / 100
        assert [found["amplitude"][place] for place in range(1, 11)] == pytest.approx(expected[1:11], rel=1e-9)
        assert found["amplitude"][0] == pytest.approx(expected[0] / 2, rel=1e-9)
        assert found["ratio"] == pytest.approx({at: expected[at] / a for at, a in WAVES.items()}, rel=1e-9)
        assert list(found["error"]) == list(WAVES)


class Exact(nn.Module):
    """Gives waves whose amplitudes are its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.amplitudes = nn.Parameter(torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.sin(2 * math.pi * x * torch.tensor(list(WAVES))) * self.amplitudes).sum(dim=1, keepdim=True)


def test_what_is_learned_has_ratio_one_and_no_error(waves: tuple[Tensor, Tensor]) -> None:
    x, y = waves
    module = Exact()
    half = Exact()
    with torch.no_grad():
        half.amplitudes[3] = 0.5
    good, short = curves(engine([module, half], x, y.expand(2, -1, -1), squared_error))
    assert [good["amplitude"][k] for k in WAVES] == pytest.approx(list(WAVES.values()), abs=1e-9)
    assert good["ratio"] == pytest.approx(dict.fromkeys(WAVES, 1.0), abs=1e-9)
    assert good["error"] == pytest.approx(dict.fromkeys(WAVES, 0.0), abs=1e-9)
    assert short["ratio"] == pytest.approx({**dict.fromkeys(WAVES, 1.0), 8: 0.5}, abs=1e-9)
    assert short["error"] == pytest.approx({**dict.fromkeys(WAVES, 0.0), 8: 0.5}, abs=1e-9)


def test_float32_inputs_and_targets_tell_the_waves(waves: tuple[Tensor, Tensor]) -> None:
    """Rounding makes no frequency of its own."""
    x, y = (part.float() for part in waves)
    module = curve_network()
    params, _ = StackedNetwork.stack([module])
    made = Engine(
        StackedNetwork(module), params, {}, [Batch(x, y[None], shared=True)], torch.zeros(1).long(), loss=squared_error
    )
    assert list(curves(made)[0]["ratio"]) == list(WAVES)


def images(count: int, side: int, draws: torch.Generator) -> Tensor:
    """Return images that vary in brightness most."""
    base = torch.randn(count, 1, 1, 1, generator=draws, dtype=torch.float64)
    noise = torch.randn(count, 1, side, side, generator=draws, dtype=torch.float64)
    return 2 + base * torch.linspace(0, 1, side) + 0.3 * noise


@pytest.mark.parametrize("side", [3, 9, 46], ids=["few pixels", "more pixels than images", "by products"])
@pytest.mark.parametrize("published", [False, True])
def test_classes_along_the_first_component(draws: torch.Generator, side: int, published: bool) -> None:
    """Published: sum f exp(2 pi i k x) of 20 frequencies, k = -10 ... 9, cut to its first ten; x as it is."""
    x = images(45, side, draws)
    modules = networks(lambda: nn.Sequential(nn.Flatten(), nn.Linear(side**2, 4)))
    y = torch.randint(4, (3, 45), generator=draws)
    made = engine(modules, x, y, cross_entropy)
    score = PCA(1, svd_solver="full").fit_transform(x.flatten(1).numpy())[:, 0]
    ks = -np.arange(-10, 10)[:10] if published else np.arange(11)  # theirs has the other sign in the exponent
    place = score if published else scaled(score)
    for k, found in enumerate(curves(made, "fourier(published=true)" if published else "fourier")):
        ours = direct(place, outputs(modules[k], x).argmax(axis=1), ks)
        true = direct(place, y[k].numpy(), ks)
        assert list(found["error"]) == list(range(len(ks)))
        assert list(found["error"].values()) == pytest.approx(abs(ours - true) / abs(true), rel=1e-8)
        assert list(found["ratio"].values()) == pytest.approx(abs(ours) / abs(true), rel=1e-8)


@pytest.mark.parametrize("published", [False, True])
def test_masks_along_the_first_component_of_the_true_ones(draws: torch.Generator, published: bool) -> None:
    x = images(30, 6, draws)
    modules = networks(lambda: nn.Conv2d(1, 2, 3, padding=1), 2)
    y = (x[:, 0] > 2.2).long().to(torch.uint8).expand(2, -1, -1, -1)

    def pixelwise(made: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(made, wanted.long())

    made = engine(modules, x, y, pixelwise)
    score = PCA(1, svd_solver="full").fit_transform(x.flatten(1).numpy())[:, 0]
    masks = PCA(1, svd_solver="full").fit(y[0].flatten(1).double().numpy())
    ks = -np.arange(-10, 10)[:10] if published else np.arange(11)
    place = score if published else scaled(score)
    origin = masks.components_[0] @ masks.mean_ if published else 0.0
    true = direct(place, y[0].flatten(1).double().numpy() @ masks.components_[0] - origin, ks)
    for k, found in enumerate(curves(made, "fourier(published=true)" if published else "fourier")):
        predicted = outputs(modules[k], x).argmax(axis=1).reshape(30, -1)
        ours = direct(place, predicted @ masks.components_[0] - origin, ks)
        assert list(found["error"].values()) == pytest.approx(abs(ours - true) / abs(true), rel=1e-8)


def test_models_with_inputs_of_their_own(draws: torch.Generator) -> None:
    """Data noise: each has an axis of its own, as if it were alone."""
    modules = networks(lambda: nn.Linear(4, 3))
    x, y = torch.randn(3, 21, 4, generator=draws, dtype=torch.float64), torch.randint(3, (3, 21), generator=draws)
    together = curves(engine(modules, x, y, cross_entropy))
    for k, module in enumerate(modules):
        (alone,) = curves(engine([module], x[k], y[k : k + 1], cross_entropy))
        for part, values in alone.items():
            assert together[k][part] == pytest.approx(values, rel=1e-9)


def test_the_first_component_points_up_whatever_the_side(draws: torch.Generator) -> None:
    for rows, columns in ((30, 5), (5, 30), (20, 2100)):
        x = torch.randn(rows, columns, generator=draws, dtype=torch.float64) * torch.arange(1, columns + 1)
        for sign in (1, -1):
            component, mean = first_component(partial(torch.split, sign * x, 4))
            expected = PCA(1, svd_solver="full").fit(x.numpy()).components_[0]
            expected = expected * np.sign(expected[abs(expected).argmax()])
            np.testing.assert_allclose(component.numpy(), expected, atol=1e-9)
            np.testing.assert_allclose(mean.numpy(), sign * x.mean(dim=0).numpy(), atol=1e-12)


def test_targets_that_are_zero_have_an_amplitude_and_no_error(draws: torch.Generator) -> None:
    x = torch.rand(20, 1, generator=draws, dtype=torch.float64)
    made = engine(networks(curve_network, 1), x, torch.zeros(1, 20, 1, dtype=torch.float64), squared_error)
    ((row,),) = measure_all(made, ["fourier"]).rows
    assert (row["value"], row["converged"]) == (None, False)
    assert set(curves(made)[0]) == {"amplitude"}


def test_outputs_that_are_not_finite_have_no_value(draws: torch.Generator) -> None:
    x = torch.rand(20, 1, generator=draws, dtype=torch.float64)
    modules = networks(curve_network, 2)
    with torch.no_grad():
        modules[1].get_parameter("2.bias").fill_(math.inf)
    well, ill = curves(engine(modules, x, torch.sin(9 * x).expand(2, -1, -1), squared_error))
    assert all(math.isfinite(value) for values in well.values() for value in values.values())
    assert all(value is None for values in ill.values() for value in values.values())


@pytest.mark.parametrize(
    ("module", "x", "y", "said"),
    [
        (nn.Linear(2, 3), torch.ones(9, 2), torch.arange(9) % 3, "not all alike"),
        (nn.Linear(2, 3), torch.full((9, 2), math.inf), torch.arange(9) % 3, "finite"),
        (nn.Linear(6, 3), torch.eye(9, 6).where(torch.eye(9, 6) < 1, math.nan), torch.arange(9) % 3, "finite"),
        (nn.Linear(2, 2), torch.rand(9, 2), torch.rand(9, 2), "one number or one class"),
        (nn.Linear(2, 2), torch.rand(9, 2), torch.rand(9, 1), "needs outputs"),
        (nn.Linear(2, 1), torch.rand(9, 2), torch.zeros(9).long(), "or of more classes"),
        (nn.Embedding(5, 3), torch.arange(9) % 5, torch.arange(9) % 3, "numbers, to have an axis"),
    ],
    ids=["alike", "infinite", "no numbers", "two values", "another shape", "one class", "tokens"],
)
def test_what_has_no_spectrum_is_refused(module: nn.Module, x: Tensor, y: Tensor, said: str) -> None:
    def any_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.flatten(1).square().mean(dim=1)

    module = module.double()
    x, y = (part.double() if part.is_floating_point() else part for part in (x, y))
    params, buffers = StackedNetwork.stack([module])
    made = Engine(
        StackedNetwork(module), params, buffers, [Batch(x, y[None], True)], torch.zeros(1).long(), loss=any_loss
    )
    with pytest.raises(RequestError, match=said):
        fourier.fourier(made)


def test_the_axis_is_made_once_for_engines_of_the_same_examples(
    draws: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not depend on the weights; another set of examples has its own."""
    calls = []

    def counted(examples: Examples) -> tuple[Tensor, Tensor]:
        calls.append(examples)
        return first_component(examples)

    monkeypatch.setattr(fourier, "first_component", counted)
    x, y = torch.rand(20, 1, generator=draws, dtype=torch.float64), torch.randint(2, (1, 20), generator=draws)
    kept: dict[Any, Any] = {}
    sets = {"val": [Batch(x[:9] + 1, y[:, :9], shared=True)]}
    for module in networks(lambda: nn.Linear(1, 2)):
        measure_all(
            engine([module], x, y, cross_entropy, of_examples=kept, sets=sets), ["fourier", "fourier(data=val)"]
        )
    assert len(calls) == 2
