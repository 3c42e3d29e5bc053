"""Networks: parameter counts that were published, and shapes of every network of the listing."""

from __future__ import annotations

import pytest
import torch

from flatmin.plugins import listing
from flatmin.settings import REQUIRED
from flatmin.trainables.networks.resnet18_narrow import resnet18_narrow


@pytest.mark.parametrize(
    ("width", "batch_norm", "skip", "count"),
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
def test_narrow_resnet_has_the_published_parameter_count(width: int, batch_norm: bool, skip: bool, count: int) -> None:
    """The counts of the published code (LPF-SGD, section 3.2)."""
    with torch.device("meta"):
        network = resnet18_narrow((3, 32, 32), 10, width=width, batch_norm=batch_norm, skip=skip)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("name", sorted(listing("network")))
def test_every_network_maps_examples_to_classes(name: str) -> None:
    plugin = listing("network")[name]
    assert all(argument.default is not REQUIRED for argument in plugin.arguments.values())
    network = plugin.load()((1, 8, 8), 7).eval()
    out = network(torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (3, 7)
    assert torch.isfinite(out).all()
