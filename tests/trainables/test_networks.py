"""Networks: parameter counts that were published, shapes, initial weights, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.plugins import get, listing
from flatmin.settings import REQUIRED
from flatmin.trainables.networks.shake_shake import shake_shake

MNIST, CIFAR, ULTRASOUND, IMAGENET = (1, 28, 28), (3, 32, 32), (1, 256, 256), (3, 224, 224)
Smallest = Callable[[str], tuple[tuple[int, ...], dict[str, Any]]]


@pytest.fixture
def build(smallest: Smallest) -> Callable[..., nn.Module]:
    """Return a function that builds a small network of three classes."""

    def built(name: str, **changes: Any) -> nn.Module:
        shape, settings = smallest(name)
        network: nn.Module = get("network", name).load()(shape, 3, **{**settings, **changes})
        return network

    return built


def count(name: str, shape: tuple[int, ...], classes: int, **settings: Any) -> int:
    with torch.device("meta"):
        network = get("network", name).load()(shape, classes, **settings)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("width", "batch_norm", "skip", "published"),
    [
        (4, True, True, 2_800_010),
        (4, True, False, 2_755_658),
        (4, False, True, 2_795_210),
        (4, False, False, 2_751_754),
        (6, True, True, 6_292_042),
        (6, True, False, 6_193_258),
        (6, False, True, 6_284_842),
        (6, False, False, 6_187_402),
        (8, True, True, 11_178_762),
        (8, True, False, 11_004_042),
        (8, False, True, 11_169_162),
        (8, False, False, 10_996_234),
    ],
)
def test_narrow_resnet_has_the_published_parameter_count(
    width: int, batch_norm: bool, skip: bool, published: int
) -> None:
    """The counts of the published code (LPF-SGD, section 3.2)."""
    assert count("resnet18_narrow", CIFAR, 10, width=width, batch_norm=batch_norm, skip=skip) == published


@pytest.mark.parametrize(
    ("width", "published"),
    [
        (1, 2_991),
        (2, 11_420),
        (4, 44_622),
        (8, 176_402),
        (10, 274_980),
        (12, 395_350),
        (16, 701_466),
        (32, 2_797_610),
        (58, 9_178_452),
        (64, 11_173_962),
    ],
)
def test_wide_resnet18_has_the_published_parameter_count(width: int, published: int) -> None:
    """The counts of the published code (LPF-SGD, section 3.2, double descent)."""
    assert count("resnet18_wide", CIFAR, 10, width=width) == published


@pytest.mark.parametrize(
    ("name", "settings", "shape", "classes", "published"),
    [
        ("lenet", {}, MNIST, 10, 1_199_882),
        ("lenet5", {}, MNIST, 10, 44_426),
        ("resnet18", {}, CIFAR, 10, 11_173_962),
        ("resnet18", {}, CIFAR, 100, 11_220_132),
        ("resnet50", {}, CIFAR, 10, 23_520_842),
        ("resnet50", {}, CIFAR, 100, 23_705_252),
        ("resnet101", {}, CIFAR, 10, 42_512_970),
        ("resnet101", {}, CIFAR, 100, 42_697_380),
        ("resnet18_imagenet", {}, IMAGENET, 1000, 11_689_512),
        ("vgg16_bn", {}, CIFAR, 10, 14_991_946),
        ("wideresnet", {"depth": 16, "width": 8}, CIFAR, 10, 10_961_370),
        ("wideresnet", {"depth": 16, "width": 8}, CIFAR, 100, 11_007_540),
        ("wideresnet", {"depth": 28, "width": 10}, CIFAR, 10, 36_479_194),
        ("wideresnet", {"depth": 28, "width": 10}, CIFAR, 100, 36_536_884),
        ("shake_shake", {"depth": 26, "width": 96}, CIFAR, 10, 26_192_922),
        ("shake_shake", {"depth": 26, "width": 96}, CIFAR, 100, 26_227_572),
        ("pyramidnet", {"depth": 110, "pyramid_alpha": 270}, CIFAR, 10, 28_485_477),
        ("pyramidnet", {"depth": 110, "pyramid_alpha": 270, "pyramid_bottleneck": True}, CIFAR, 10, 18_323_787),
        ("pyramidnet", {"depth": 110, "pyramid_alpha": 270, "pyramid_bottleneck": True}, CIFAR, 100, 18_426_837),
        ("pyramidnet", {"depth": 110, "pyramid_alpha": 200, "pyramid_bottleneck": True}, CIFAR, 10, 10_668_722),
        ("pyramidnet", {"depth": 110, "pyramid_alpha": 200, "pyramid_bottleneck": True}, CIFAR, 100, 10_746_572),
        ("pyramidnet", {"depth": 272, "pyramid_alpha": 200, "pyramid_bottleneck": True}, CIFAR, 10, 26_210_842),
        ("pyramidnet", {"depth": 272, "pyramid_alpha": 200, "pyramid_bottleneck": True}, CIFAR, 100, 26_288_692),
        ("unet", {}, ULTRASOUND, 2, 31_200_322),
        ("mlp", {"width": 256, "depth": 4}, (1,), 1, 198_145),  # the sinusoids of the CS-439 project
        ("mlp", {"width": 784, "depth": 1}, MNIST, 10, 623_290),  # its MNIST
    ],
)
def test_networks_have_the_published_parameter_counts(
    name: str, settings: dict[str, Any], shape: tuple[int, ...], classes: int, published: int
) -> None:
    """The counts of the published code of LPF-SGD, the OptML project and the CS-439 project, and torchvision's."""
    assert count(name, shape, classes, **settings) == published


@pytest.mark.parametrize("name", sorted(listing("network")))
def test_every_network_maps_examples_to_classes(name: str, smallest: Smallest) -> None:
    plugin = listing("network")[name]
    assert all(argument.default is not REQUIRED for argument in plugin.arguments.values())
    shape, settings = smallest(name)
    network = plugin.load()(shape, 7, **settings).eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    out = network(x)
    assert out.shape == ((3, 7, *shape[1:]) if name == "unet" else (3, 7))
    assert torch.isfinite(out).all()
    torch.testing.assert_close(network(x[:1]), out[:1])  # eval mode: an example does not depend on the others


@pytest.mark.parametrize(
    ("name", "settings", "published"),
    [
        ("resnet18", {}, {32: {64}, 16: {128}, 8: {256}, 4: {512}}),
        ("resnet50", {"width": 2}, {32: {2, 8, 4}, 16: {4, 16, 8}, 8: {8, 32, 16}, 4: {16, 64}}),
        ("resnet18_imagenet", {}, {16: {64}, 8: {64}, 4: {128}, 2: {256}, 1: {512}}),
        ("vgg16_bn", {"width": 2}, {32: {2}, 16: {4}, 8: {8}, 4: {16}, 2: {16}}),
        ("wideresnet", {"depth": 16, "width": 2}, {32: {16, 32}, 16: {64}, 8: {128}}),
        ("shake_shake", {"depth": 8, "width": 4}, {32: {16, 4}, 16: {8}, 8: {16}}),
        ("pyramidnet", {"depth": 14, "pyramid_alpha": 6}, {32: {16, 17, 18}, 16: {19, 20}, 8: {21, 22}}),
        ("unet", {"width": 2}, {32: {2}, 16: {4, 10}, 8: {8, 2}, 4: {16, 4}, 2: {32, 8}, 1: {16}}),
    ],
)
def test_images_shrink_and_channels_grow_as_published(
    name: str, settings: dict[str, Any], published: dict[int, set[int]]
) -> None:
    """The channels that BatchNorm sees at each size of the image, from 32 x 32 on."""
    seen: dict[int, set[int]] = {}

    def look(module: nn.Module, _: Any, out: Tensor) -> None:
        seen.setdefault(out.shape[-1], set()).add(out.shape[1])

    with torch.device("meta"):
        network = get("network", name).load()(CIFAR, 10, **settings).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(look)
        network(torch.empty(1, *CIFAR))
    assert seen == published


@pytest.mark.parametrize("name", ["wideresnet", "shake_shake", "pyramidnet", "resnet18_imagenet", "resnet18_narrow"])
def test_convolutions_start_from_the_variance_of_he(name: str, build: Callable[..., nn.Module]) -> None:
    """Normal with variance 2 / (kernel area x output channels)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(name, **{"wideresnet": {"width": 4}, "shake_shake": {"width": 32}}.get(name, {}))
    drawn = [
        module.weight.detach().flatten() / math.sqrt(2 / (module.weight[0, 0].numel() * module.out_channels))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    everything = torch.cat(drawn).double()
    assert abs(float(everything.mean())) < 5 / math.sqrt(len(everything))
    assert abs(float(everything.var()) - 1) < 5 * math.sqrt(2 / len(everything))
    assert abs(float((everything**4).mean()) - 3) < 5 * math.sqrt(96 / len(everything))
    for part in drawn:
        assert abs(float(part.var()) - 1) < 6 * math.sqrt(2 / len(part))


@pytest.mark.parametrize("name", ["lenet", "lenet5", "mlp", "resnet18_wide", "resnet50", "unet", "vgg16_bn"])
def test_other_weights_start_from_pytorchs_default(name: str, build: Callable[..., nn.Module]) -> None:
    """Uniform within 1 / sqrt(fan-in) (of transposed convolutions, torch counts the outputs)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(name)
    drawn = torch.cat(
        [
            module.weight.detach().flatten() * math.sqrt(module.weight[0].numel())
            for module in network.modules()
            if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)
        ]
    ).double()
    assert float(drawn.abs().max()) <= 1 + 1e-6
    assert abs(float(drawn.var()) - 1 / 3) < 5 * math.sqrt(4 / 45 / len(drawn))


@pytest.mark.parametrize("name", ["wideresnet", "shake_shake"])
def test_biases_of_the_classes_start_from_zero(name: str, build: Callable[..., nn.Module]) -> None:
    (classifier,) = [module for module in build(name).modules() if isinstance(module, nn.Linear)]
    assert not classifier.bias.any()
    assert classifier.weight.any()


@pytest.mark.parametrize("name", sorted(set(listing("network")) - {"linear_at_zero"}))
def test_two_seeds_give_two_networks_and_one_seed_gives_one(name: str, build: Callable[..., nn.Module]) -> None:
    rows = []
    with torch.random.fork_rng():
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            rows.append(torch.cat([parameter.detach().flatten() for parameter in build(name).parameters()]))
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])


def test_a_single_channel_enters_torchvisions_resnet_through_the_same_stem() -> None:
    with torch.device("meta"):
        grey, colour = (get("network", "resnet18_imagenet").load()((c, 64, 64), 200) for c in (1, 3))
    assert repr(grey.conv1) == repr(colour.conv1).replace("Conv2d(3,", "Conv2d(1,")
    assert sum(p.numel() for p in colour.parameters()) - sum(p.numel() for p in grey.parameters()) == 2 * 64 * 49


@pytest.mark.parametrize("name", sorted(set(listing("network")) - {"mlp", "linear_at_zero"}))
def test_examples_that_are_no_images_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=rf"'{name}' takes images .* this data set is \[13\]; 'mlp' takes any"):
        get("network", name).load()((13,), 3)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lenet", (1, 5, 28), "'lenet' takes images from 6 x 6 on, and this data set's are 5 x 28"),
        ("lenet5", (1, 8, 8), "'lenet5' takes images from 16 x 16 on, and this data set's are 8 x 8"),
        ("unet", (1, 28, 28), "'unet' takes images from 32 x 32 on, and this data set's are 28 x 28"),
        ("unet", (1, 256, 250), "multiples of 32, and this data set's are 256 x 250"),
    ],
)
def test_images_of_a_size_that_a_network_cannot_take_are_refused(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        get("network", name).load()(shape, 10)


@pytest.mark.parametrize(("name", "least"), [("lenet", 6), ("lenet5", 16), ("unet", 32), ("resnet18_wide", 1)])
def test_the_smallest_images_are_taken(name: str, least: int) -> None:
    network = get("network", name).load()((1, least, least), 3).eval()
    assert torch.isfinite(network(torch.ones(2, 1, least, least))).all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wideresnet", {"depth": 27}, r"depth = 27 is not 4 \+ 6 x blocks per stage; the nearest that are: 22, 28"),
        ("wideresnet", {"depth": 4}, "the nearest that are: 10, 16"),
        ("shake_shake", {"depth": 28}, r"depth = 28 is not 2 \+ 6 x .*: 26, 32"),
        ("pyramidnet", {"depth": 111}, r"depth = 111 is not 2 \+ 6 x .*: 110, 116"),
        ("pyramidnet", {"depth": 114, "pyramid_bottleneck": True}, r"2 \+ 9 x .*: 110, 119"),
    ],
)
def test_depths_that_make_no_network_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        get("network", name).load()(CIFAR, 10, **settings)


def test_shortcuts_of_two_halves_need_an_even_width() -> None:
    with pytest.raises(RequestError, match="width = 5 must be even"):
        shake_shake(CIFAR, 10, width=5)
