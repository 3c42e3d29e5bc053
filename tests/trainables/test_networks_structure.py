"""Networks against the same function written another way: by torchvision, or line by line from the papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import vgg

from flatmin.plugins import get


class Formula:
    """The layers of a network as functions, which take its parameters one after another."""

    def __init__(self, network: nn.Module) -> None:
        self.left: Iterator[Tensor] = iter(network.parameters())

    def conv(self, x: Tensor, stride: int = 1, *, bias: bool = False) -> Tensor:
        weight = next(self.left)
        padding = weight.shape[-1] // 2
        return functional.conv2d(x, weight, next(self.left) if bias else None, stride, padding)

    def norm(self, x: Tensor) -> Tensor:
        """Normalise every channel by the mean and variance over examples and pixels."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        gamma, beta = (next(self.left).reshape(-1, *[1] * (x.dim() - 2)) for _ in range(2))
        centred = x - x.mean(axes, keepdim=True)
        return gamma * centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt() + beta

    def linear(self, x: Tensor) -> Tensor:
        return x @ next(self.left).T + next(self.left)

    def classes(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def wideresnet(f: Formula, x: Tensor) -> Tensor:
    """WRN-16-2."""
    x = f.conv(x)
    for stage in range(3):
        for block in range(2):
            first = f.norm(x).relu()
            path = f.conv(first, 2 if stage and not block else 1)
            path = f.conv(f.norm(path).relu())
            x = path + (f.conv(first, 2 if stage else 1) if not block else x)
    return f.classes(f.norm(x).relu())


def pyramidnet(f: Formula, x: Tensor) -> Tensor:
    """PyramidNet-14 of basic blocks."""
    x = f.norm(f.conv(x))
    for number in range(6):
        path = f.norm(f.conv(f.norm(f.conv(f.norm(x), 2 if number in (2, 4) else 1)).relu()))
        x = functional.avg_pool2d(x, 2) if number in (2, 4) else x
        x = path + torch.cat([x, torch.zeros_like(path[:, : path.shape[1] - x.shape[1]])], dim=1)
    return f.classes(f.norm(x).relu())


def pyramidnet_bottleneck(f: Formula, x: Tensor) -> Tensor:
    """PyramidNet-20 of bottlenecks."""
    x = f.norm(f.conv(x))
    for number in range(6):
        path = f.norm(f.conv(f.norm(x))).relu()
        path = f.norm(f.conv(path, 2 if number in (2, 4) else 1)).relu()
        path = f.norm(f.conv(path))
        x = functional.avg_pool2d(x, 2) if number in (2, 4) else x
        x = path + torch.cat([x, torch.zeros_like(path[:, : path.shape[1] - x.shape[1]])], dim=1)
    return f.classes(f.norm(x).relu())


def unet(f: Formula, x: Tensor) -> Tensor:
    """Blocks of two convolutions; down five times, and up again with the pooled maps of the same size."""

    def twice(x: Tensor) -> Tensor:
        for _ in range(2):
            x = f.norm(f.conv(x, bias=True)).relu()
        return x

    maps = []
    for _ in range(5):
        x = twice(x).unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
        maps.append(x)
    for number in range(5):
        x = twice(x if number == 0 else torch.cat([x, maps[4 - number]], dim=1))
        weight, bias = next(f.left), next(f.left)
        spread = torch.einsum("bihw,ioyx->bohywx", x, weight) + bias.reshape(-1, 1, 1, 1, 1)
        x = spread.reshape(len(x), weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    return x


def lenet(f: Formula, x: Tensor) -> Tensor:
    """Dropout is not in it: eval mode."""
    for _ in range(2):
        weight, bias = next(f.left), next(f.left)
        x = functional.conv2d(x, weight, bias).relu()
    x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)).flatten(1)
    return f.linear(f.linear(x).relu())


def lenet5(f: Formula, x: Tensor) -> Tensor:
    for _ in range(2):
        weight, bias = next(f.left), next(f.left)
        x = functional.conv2d(x, weight, bias).relu().unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    return f.linear(f.linear(f.linear(x.flatten(1)).relu()).relu())


@pytest.mark.parametrize(
    ("name", "settings", "shape", "formula"),
    [
        ("wideresnet", {"depth": 16, "width": 2}, (3, 16, 16), wideresnet),
        ("pyramidnet", {"depth": 14, "pyramid_alpha": 10}, (3, 16, 16), pyramidnet),
        (
            "pyramidnet",
            {"depth": 20, "pyramid_alpha": 10, "pyramid_bottleneck": True},
            (3, 8, 8),
            pyramidnet_bottleneck,
        ),
        ("unet", {"width": 2}, (1, 64, 32), unet),
        ("lenet", {"dropout": 0.0}, (1, 28, 20), lenet),
        ("lenet5", {}, (1, 28, 28), lenet5),
    ],
)
def test_networks_compute_what_the_papers_say(
    name: str, settings: dict[str, Any], shape: tuple[int, ...], formula: Callable[[Formula, Tensor], Tensor]
) -> None:
    network, x = randomised(get("network", name).load()(shape, 5, **settings), shape)
    own = Formula(network)
    torch.testing.assert_close(network(x), formula(own, x), rtol=0, atol=1e-10)
    assert not list(own.left)


def randomised(network: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """Return a network in float64 and training mode, no vector of which is constant, and examples for it."""
    generator = torch.Generator().manual_seed(0)
    network = network.double().train()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    return network, torch.randn(4, *shape, generator=generator, dtype=torch.float64)


def small_images(network: nn.Module) -> nn.Module:
    """Return torchvision's network with the stem for 32 x 32 images."""
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18", lambda: small_images(torchvision.models.resnet18(num_classes=10))),
        ("resnet50", lambda: small_images(torchvision.models.resnet50(num_classes=10))),
        ("resnet18_imagenet", lambda: torchvision.models.resnet18(num_classes=10)),
    ],
)
def test_resnets_compute_what_torchvisions_do(name: str, theirs: Callable[[], nn.Module]) -> None:
    """Outputs in training mode, and the running statistics that they leave."""
    ours, x = randomised(get("network", name).load()((3, 16, 16), 10), (3, 16, 16))
    other = theirs().double().train()
    with torch.no_grad():
        for own, parameter in zip(ours.parameters(), other.parameters(), strict=True):
            parameter.copy_(own)
    torch.testing.assert_close(ours(x), other(x), rtol=0, atol=1e-10)
    for left, right in zip(ours.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def test_resnet18_imagenet_starts_from_torchvisions_weights() -> None:
    """Names and values: seeds and checkpoints from before it had a width hold."""
    states = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        states.append(get("network", "resnet18_imagenet").load()((3, 8, 8), 10).state_dict())
        torch.manual_seed(0)
        states.append(torchvision.models.resnet18(num_classes=10).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resnet101_has_the_tensors_of_torchvisions() -> None:
    with torch.device("meta"):
        ours = get("network", "resnet101").load()((3, 32, 32), 10)
        theirs = small_images(torchvision.models.resnet101(num_classes=10))
    assert [tensor.shape for tensor in ours.state_dict().values()] == [
        tensor.shape for tensor in theirs.state_dict().values()
    ]


def test_resnet18_is_the_wide_one_of_width_64() -> None:
    states = []
    with torch.random.fork_rng():
        for name, settings in (("resnet18", {}), ("resnet18_wide", {"width": 64})):
            torch.manual_seed(0)
            states.append(get("network", name).load()((3, 8, 8), 10, **settings).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_vgg_has_torchvisions_features_and_the_small_head() -> None:
    network, x = randomised(get("network", "vgg16_bn").load()((3, 32, 32), 10), (3, 32, 32))
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=True).double().train()
    parameters = list(network.parameters())
    with torch.no_grad():
        for parameter in features.parameters():
            parameter.copy_(parameters.pop(0))
    own = Formula(nn.ParameterList(parameters))
    expected = own.linear(own.norm(own.linear(features(x).flatten(1))).relu())
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-10)
