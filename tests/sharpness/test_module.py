"""`flatmin.sharpness.measure` of anybody's module."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from flatmin.errors import FlatminError, RequestError
from flatmin.sharpness import Curve, Engine, Estimate, curves, measure, measure_stack, scale, surface_between
from flatmin.sharpness.estimate import exact
from flatmin.stack import StackedNetwork, stream_key

LABELS = ["lpf(sigma=0.1)", "hessian_trace", "lambda_max", "eps_sharpness"]


def model(**options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 5, **options), nn.BatchNorm1d(5, **options), nn.ReLU(), nn.Linear(5, 3, **options)
        )


def examples(n: int = 90) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def test_three_lines_give_a_table() -> None:
    frame = measure(model(), nn.CrossEntropyLoss(), DataLoader(TensorDataset(*examples()), batch_size=40), LABELS)
    assert frame["label"].tolist() == LABELS
    assert bool(frame["converged"].all())
    assert bool((frame["value"] > 0).all())
    assert frame["metric"].tolist() == ["filter"] * 4


def test_values_are_those_of_the_engine(mlp: Any) -> None:
    mlp.keys[1] = stream_key("measure", 5)
    rows = measure_stack(mlp.engine().select(torch.tensor([1])), LABELS)
    frame = measure(mlp.modules[1], "cross_entropy", (mlp.x, mlp.y[1]), LABELS, seed=5)
    assert frame["value"].tolist() == pytest.approx([row["value"] for (row,) in rows], rel=1e-12)
    assert frame["samples"].tolist() == [row["samples"] for (row,) in rows]
    other = measure(mlp.modules[1], "cross_entropy", (mlp.x, mlp.y[1]), LABELS, seed=6)
    assert other["value"][0] != frame["value"][0]


@pytest.mark.parametrize("form", ["tuple", "loader", "list", "generator"])
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_every_form_of_data_gives_the_same(form: str, vectorize: Any) -> None:
    x, y = examples()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield x[:50], y[:50]
        yield x[50:], y[50:]

    forms: dict[str, Any] = {
        "tuple": (x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=32),
        "list": list(batches()),
        "generator": batches(),
    }
    frame = measure(model(), "cross_entropy", forms[form], LABELS, vectorize=vectorize)
    expected = measure(model(), "cross_entropy", (x, y), LABELS)
    assert frame["value"].tolist() == pytest.approx(expected["value"].tolist(), rel=1e-3)


def test_a_loss_of_ones_own_for_a_regression() -> None:
    x, module = examples()[0].double(), nn.Linear(4, 2).double()
    target = x[:, :2] ** 2
    label = ["hessian_trace(metric=identity)"]
    ours = measure(module, lambda outputs, y: (outputs - y).square().mean(), (x, target), label)
    by_torch = measure(module, nn.MSELoss(), (x, target), label)
    by_name = measure(module, "squared_error", (x, target), label)
    expected = 2 * (x.square().sum(dim=1).mean() + 1).item()
    for frame in (ours, by_torch, by_name):
        assert frame["value"][0] == pytest.approx(expected, rel=1e-9)


def test_a_shuffled_loader_and_augmentation_leave_every_generator() -> None:
    class Augmented(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            x, y = (tensor[index] for tensor in self.tensors)
            return x + random.random() + float(np.random.random()) + torch.rand(()), y

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    measure(model(), "cross_entropy", DataLoader(Augmented(*examples()), batch_size=30, shuffle=True), ["lambda_max"])
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == str(states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_context_does_not_matter(context: Any) -> None:
    data, module = examples(), model()
    expected = measure(module, "cross_entropy", data, ["lambda_max"])["value"][0]
    with context():
        assert measure(module, "cross_entropy", data, ["lambda_max"])["value"][0] == expected


def test_half_precision_is_measured_in_single() -> None:
    x, y = examples()
    frame = measure(model(dtype=torch.bfloat16), "cross_entropy", (x.bfloat16(), y), ["lambda_max"])
    expected = measure(model(), "cross_entropy", (x, y), ["lambda_max"])
    assert frame["value"][0] == pytest.approx(expected["value"][0], rel=0.05)


def test_other_sets_and_subsets() -> None:
    x, y = examples(200)
    frame = measure(
        model(), "cross_entropy", (x, y), ["lpf", "lpf(subset=80)", "lpf(data=test)"], sets={"test": (x[:99], y[:99])}
    )
    expected = measure(model(), "cross_entropy", (x[:99], y[:99]), ["lpf"])
    assert frame["value"][2] == expected["value"][0]
    assert frame["stderr"][1] > frame["stderr"][0]


@pytest.mark.parametrize(
    ("name", "said"), [("tst", "'tst'.*Did you mean 'test'"), ("train", "'train'.*Valid: test, val")]
)
def test_a_set_that_nothing_asks_for_is_refused(name: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        measure(model(), "cross_entropy", examples(), ["lpf"], sets={name: examples()})


def test_initial_weights_reach_the_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def distance(engine: Engine, **arguments: Any) -> Estimate:
        return exact((engine.params - engine.initial_weights()).double().norm(dim=1), passes=0.0)

    monkeypatch.setattr("flatmin.sharpness.lpf.lpf", distance)
    module, start = model(), model()
    with torch.no_grad():
        start[0].weight[1, 2] += 3.0  # type: ignore[index]
    for initial in (start, start.state_dict()):
        frame = measure(module, "cross_entropy", examples(), ["lpf"], initial=initial)
        assert frame["value"][0] == pytest.approx(3.0)
    with pytest.raises(FlatminError, match="lpf failed: the initial weights are needed, and were not given"):
        measure(module, "cross_entropy", examples(), ["lpf"])
    with pytest.raises(RequestError, match=r"initial: the parameter '0.weight' has the shape \[6, 4\]"):
        measure(module, "cross_entropy", examples(), ["lpf"], initial={"0.weight": torch.zeros(6, 4)})
    with pytest.raises(RequestError, match=r"initial: the parameter '0\.weight' is missing"):
        measure(module, "cross_entropy", examples(), ["lpf"], initial={})


def test_curves_come_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def surface(engine: Engine, **arguments: Any) -> Estimate:
        grid = torch.zeros(1, 3, dtype=torch.float64)
        return replace(exact(engine.losses(), passes=1.0), curves=[Curve("surface", grid, grid + 2, y=grid + 1)])

    monkeypatch.setattr("flatmin.sharpness.lpf.lpf", surface)
    frame = curves(model(), "cross_entropy", examples(), ["lpf"])
    assert frame[["kind", "x", "y", "value"]].to_numpy().tolist() == [["surface", 0.0, 1.0, 2.0]] * 3
    assert curves(model(), "cross_entropy", examples(), []).empty


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_undefined(bad: float) -> None:
    x, y = examples()
    x[3] = bad
    frame = measure(model(), "cross_entropy", (x, y), LABELS)
    assert frame["value"].isna().all()
    assert not frame["converged"].any()


def test_a_zero_gradient_has_no_eps_sharpness() -> None:
    x, y = examples()
    dead = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.zero_()
        torch.nn.init.constant_(dict(dead.named_parameters())["0.bias"], -1.0)
    row = measure(dead, "cross_entropy", (x, y), ["eps_sharpness(metric=identity)"]).iloc[0]
    assert row["value"] is None or np.isnan(row["value"])
    assert not row["converged"]


EVERY = ["l2_norm", "distance_from_initialisation", "path_norm", "spectral_norms", "lpf", "lambda_max", "fisher_rao"]


def values(module: nn.Module, labels: list[str], **options: Any) -> list[float]:
    frame = measure(module.double(), "cross_entropy", (examples()[0].double(), examples()[1]), labels, **options)
    found: list[float] = frame["value"].tolist()
    return found


def test_a_model_that_is_all_frozen_is_measured_as_one_that_is_not() -> None:
    module, start = model(), model().requires_grad_(False)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.1)
    expected = values(module, EVERY, initial=start)
    assert values(module.requires_grad_(False), EVERY, initial=start) == expected
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_frozen_weights_are_no_weights() -> None:
    """They are a fixed part of the network, through which its paths go."""
    module = model().double().eval()
    module[0].requires_grad_(False)  # type: ignore[index]
    module[1].requires_grad_(False)  # type: ignore[index]
    head = module[3]  # type: ignore[index]
    path = values(copy.deepcopy(module).requires_grad_(True), ["path_norm"])
    found = dict(zip(EVERY, values(module, EVERY, initial=model()), strict=True))
    flat = nn.utils.parameters_to_vector(head.parameters())
    assert found["l2_norm"] == pytest.approx(flat.norm().item(), rel=1e-12)
    assert found["spectral_norms"] == pytest.approx(float(np.log(np.linalg.norm(head.weight.detach(), 2))), rel=1e-12)
    assert found["path_norm"] == path[0]
    features, y = module[:3](examples()[0].double()), examples()[1]  # type: ignore[index]
    for label in ("lpf", "lambda_max", "fisher_rao"):
        alone = measure(head, "cross_entropy", (features, y), [label])
        assert found[label] == pytest.approx(alone["value"][0], rel=1e-9)


class Tied(nn.Module):
    """Two layers of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return y


def test_shared_weights_are_measured() -> None:
    """Against the network of two matrices that are alike."""
    module = Tied().double()
    apart = copy.deepcopy(module)
    apart.b.weight = nn.Parameter(apart.a.weight.detach().clone())
    labels = [
        "path_norm",
        "spectral_norms",
        "fisher_rao",
        "l2_norm",
        "lpf",
        "loss_surface",
        "hessian_trace(metric=identity)",
    ]
    found, expected = (values(each, labels) for each in (module, apart))
    assert found[:3] == pytest.approx(expected[:3], rel=1e-9)
    flat = nn.utils.parameters_to_vector(module.parameters())
    assert found[3] == pytest.approx(flat.norm().item(), rel=1e-12)
    assert found[3] < expected[3]
    names = list(dict(module.named_parameters()))

    def loss(*tensors: Tensor) -> Tensor:
        outputs = functional_call(module, dict(zip(names, tensors, strict=True)), (examples()[0].double(),))
        return nn.functional.cross_entropy(outputs, examples()[1])

    blocks = torch.autograd.functional.hessian(loss, tuple(module.parameters()))  # type: ignore[no-untyped-call]
    trace = sum(blocks[k][k].reshape(p.numel(), -1).trace().item() for k, p in enumerate(module.parameters()))
    assert found[6] == pytest.approx(trace, rel=1e-9)


def test_the_scale_of_shared_weights_is_that_of_their_rows() -> None:
    network = StackedNetwork(Tied())
    params, _ = StackedNetwork.stack([network.template])
    d = network.views(scale(network, params, "filter"))
    rows = network.template.a.weight.detach().norm(dim=1)  # type: ignore[union-attr, operator]
    for name in ("a", "b"):
        bias = getattr(network.template, name).bias.detach().abs()
        assert d[f"{name}.bias"][0].tolist() == pytest.approx((rows + bias).tolist(), rel=1e-6)
    assert d["a.weight"][0, :, 0].tolist() == pytest.approx(d["a.bias"][0].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": 0}, "points = 0"),
        ({"points": 1}, "should be 2 points or more"),
        ({"reach": -0.4}, r"reach = -0\.4"),
        ({"vectorize": "vmapp"}, "valid: auto, vmap, loop"),
        ({"memory": -1}, "memory = -1"),
    ],
)
def test_a_line_that_cannot_be_drawn_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        surface_between(model(), model(), "cross_entropy", examples(), **change)


def test_a_subset_of_batches_of_different_shapes_is_refused() -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Linear(4, 3))
    data = [(torch.randn(90, size), torch.arange(90) % 3) for size in (8, 5)]
    assert bool(measure(module, "cross_entropy", data, ["lpf"])["converged"].all())
    with pytest.raises(RequestError, match=r"examples of different shapes cannot be drawn from: \(8,\), \(5,\)"):
        measure(module, "cross_entropy", data, ["lpf(subset=64)"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.ReLU()}, "the network has no parameters"),
        ({"loss": lambda outputs, y: torch.zeros(len(y))}, "the loss does not depend on the weights"),
        ({"loss": nn.CrossEntropyLoss(ignore_index=0)}, "reduction='none'"),
        ({"loss": "crossentropy"}, "no loss 'crossentropy'; valid: cross_entropy"),
        ({"data": []}, "no examples to measure on"),
        ({"data": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))}, "no examples to measure on"),
        ({"data": [torch.zeros(3, 4)]}, "wrap a Dataset in a DataLoader"),
        ({"data": [(torch.zeros(4), 1)]}, "wrap a Dataset in a DataLoader"),
        ({"data": TensorDataset(torch.zeros(3, 4), torch.zeros(3, 4))}, "wrap it in a DataLoader"),
        ({"data": None}, "it is NoneType"),
        ({"data": (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))}, r"inputs \[3, 4\] and targets \[2\] differ"),
        ({"data": (torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64))}, "cannot be evaluated on the examples"),
        ({"measures": "lpf"}, r"write \['lpf'\]"),
        ({"measures": ["lpff"]}, "'lpff'"),
        ({"measures": None}, r"measures = None: should be a list of labels"),
        ({"measures": [3]}, r"measures = \[3\]: should be a list of labels"),
        ({"memory": "lots"}, "memory = 'lots': should be a number of bytes"),
        ({"memory": -1}, "memory = -1"),
        ({"vectorize": "vmapp"}, "valid: auto, vmap, loop"),
        ({"model": model().to("meta")}, "the network is on the device 'meta'"),
        ({"data": (torch.zeros(3, 4, device="meta"), torch.zeros(3).long())}, "the examples are on the device 'meta'"),
        ({"loss": lambda outputs, y: (outputs + 0j).sum(dim=1)}, "the loss is complex"),
        ({"loss": lambda outputs, y: (0 * outputs).sum(dim=1)}, "the same at the weights and at random ones"),
        ({"measures": ["lpf(data=val)"]}, "there is no 'val' set to measure on; there are: train"),
        (
            {"model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))},
            "layer '1' normalises",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"model": model(), "loss": "cross_entropy", "data": examples(), "measures": ["lpf"], **change}
    state = torch.get_rng_state()
    with pytest.raises(FlatminError, match=message):
        measure(**given)
    assert torch.equal(torch.get_rng_state(), state)


class _Fused(nn.TransformerEncoderLayer):
    """Takes torch's fused kernel, which it leaves where somebody looks at its parts."""

    def forward(self, *given: Any, **named: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            return super().forward(*given, **named)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_layer_that_only_a_loop_differentiates_is_named() -> None:
    layer = _Fused(4, 2, 8, batch_first=True)
    module, (x, y) = nn.Sequential(nn.Unflatten(1, (1, 4)), layer, nn.Flatten(), nn.Linear(4, 3)), examples()
    with pytest.raises(RequestError, match=r"no derivative.*vectorize='loop'"):
        measure(module, "cross_entropy", (x, y), ["lpf"])
    assert measure(module, "cross_entropy", (x, y), ["lpf"], vectorize="loop")["converged"][0]


def test_too_few_samples_are_not_converged() -> None:
    frame = measure(model(), "cross_entropy", examples(), ["lpf(sigma=0.5, max_samples=2)"])
    assert not frame["converged"][0]
    assert frame["samples"][0] == 2
