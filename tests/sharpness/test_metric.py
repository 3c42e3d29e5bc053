from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin.sharpness import scale
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.eps_sharpness import eps_sharpness
from flatmin.sharpness.hessian_trace import hessian_trace
from flatmin.sharpness.lambda_max import lambda_max
from flatmin.sharpness.lpf import lpf
from flatmin.stack import StackedNetwork


def scales(module: nn.Module, metric: Any = "filter") -> dict[str, Tensor]:
    """Return a single module's D, by parameter."""
    network = StackedNetwork(module.double())
    d = scale(network, StackedNetwork.stack([module])[0], metric)
    assert d.dtype == torch.float64
    return {name: view[0] for name, view in network.views(d).items()}


def test_filters_and_their_biases() -> None:
    conv, norm, linear = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 4, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    d = scales(nn.Sequential(conv, norm, nn.Flatten(), linear))
    assert conv.bias is not None
    for j in range(3):
        of_filter = conv.weight[j].norm() + conv.bias[j].abs()
        of_channel = norm.weight[j].abs() + norm.bias[j].abs()
        torch.testing.assert_close(d["0.weight"][j], of_filter.expand(2, 3, 3))
        torch.testing.assert_close(d["0.bias"][j], of_filter)
        torch.testing.assert_close(d["1.weight"][j], of_channel)
        torch.testing.assert_close(d["1.bias"][j], of_channel)
    torch.testing.assert_close(d["3.weight"], linear.weight.norm(dim=1, keepdim=True).expand(4, 3))


def test_transposed_convolutions_count_filters_along_their_second_axis() -> None:
    module = nn.ConvTranspose1d(2, 3, 5)
    d = scales(module)
    assert module.bias is not None
    expected = module.weight.norm(dim=(0, 2)) + module.bias.abs()
    torch.testing.assert_close(d["weight"], expected[None, :, None].expand(2, 3, 5))
    torch.testing.assert_close(d["bias"], expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(4, 3),
        nn.LayerNorm([2, 3]),
        nn.ConvTranspose1d(4, 2, 3, groups=2),
        nn.PReLU(),
        nn.Bilinear(2, 3, 4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_any_other_parameter_has_the_norm_of_the_whole(module: nn.Module) -> None:
    nn.init.normal_(next(module.parameters()))
    d = scales(module)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(d[name], parameter.norm().detach().expand_as(parameter))


def test_element_and_identity() -> None:
    module = nn.Linear(3, 2)
    torch.testing.assert_close(scales(module, "element")["weight"], module.weight.detach().abs())
    assert bool((scales(module, "identity")["bias"] == 1).all())


def test_a_metric_that_is_none() -> None:
    with pytest.raises(ValueError, match="no metric 'filtre'; valid: identity, filter, element"):
        scales(nn.Linear(3, 2), "filtre")


def test_dead_filters_stay_where_they_are(conv: Any) -> None:
    for module in conv.modules:
        with torch.no_grad():
            module[1].weight[0], module[1].bias[0] = 0.0, 0.0
            module[3].weight[1], module[3].bias[1] = 0.0, 0.0
    engine = conv.engine()
    assert int((engine.scale("filter") == 0).sum()) == 2 * (2 + 13)
    for measure in (lpf, hessian_trace, lambda_max, eps_sharpness):
        estimate = measure(engine)
        assert bool(estimate.value.isfinite().all())
        assert bool(estimate.stderr.isfinite().all())


class Balanced(nn.Module):
    """A layer whose filters were divided by D and whose output is multiplied by it."""

    def __init__(self, layer: nn.Module, d: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("d", d)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.div_(d.reshape(-1, *[1] * (parameter.dim() - 1)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * self.get_buffer("d").reshape(-1, *[1] * (y.dim() - 2))


def balance(module: nn.Module) -> nn.Module:
    layers: list[nn.Module] = []
    for layer in module.children():
        own = dict(layer.named_parameters())
        if own:
            weight = own["weight"].detach().flatten(1) if own["weight"].dim() > 1 else own["weight"].detach()[:, None]
            d = weight.norm(dim=1) + (own["bias"].detach().abs() if "bias" in own else 0.0)
            layers.append(Balanced(layer, d))
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("measure", [partial(lpf, sigma=0.3), hessian_trace, lambda_max, eps_sharpness])
def test_the_filter_metric_is_balancing(problem: Any, measure: Any) -> None:
    """Also one by one: the same noise on a network balanced by hand, where no metric is needed."""
    by_metric = problem.engine()
    expected = measure(by_metric, metric="filter").value
    plain = measure(by_metric, metric="identity").value
    modules = [balance(module) for module in problem.modules]
    params, buffers = StackedNetwork.stack(modules)
    by_hand = Engine(StackedNetwork(modules[0]), params, buffers, by_metric.batches, problem.keys)
    torch.testing.assert_close(measure(by_hand, metric="identity").value, expected, rtol=1e-6, atol=0)
    assert bool(((plain - expected).abs() > 1e-3 * expected.abs()).all())
