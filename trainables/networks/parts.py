"""What several networks share: checks of what they are asked for, and the initialisation of He et al. 2015."""

from __future__ import annotations

from torch import nn

from flatmin.errors import RequestError


def image_channels(network: str, input_shape: tuple[int, ...], *, least: int = 1, multiple: int = 1) -> int:
    """Return the channels of the images that a network is asked to take.

    Args:
        network: The network's name.
        input_shape: The shape of one example.
        least: The smallest height and width that it can take.
        multiple: What height and width must be multiples of.

    Raises:
        RequestError: The examples are no images, or not of a size that the network can take.
    """
    if len(input_shape) != 3:
        raise RequestError(
            f"'{network}' takes images [channels, height, width], and an example of this data set is "
            f"{list(input_shape)}; 'mlp' takes any"
        )
    channels, height, width = input_shape
    if min(height, width) < least:
        raise RequestError(
            f"'{network}' takes images from {least} x {least} on, and this data set's are {height} x {width}"
        )
    if height % multiple or width % multiple:
        raise RequestError(
            f"'{network}' takes images whose height and width are multiples of {multiple}, and this data set's are "
            f"{height} x {width}"
        )
    return channels


def blocks_per_stage(network: str, depth: int, *, outside: int, per_block: int) -> int:
    """Return how many blocks each of three stages has in a network of `depth = outside + per_block x blocks` layers.

    Raises:
        RequestError: There is no such network.
    """
    blocks, rest = divmod(depth - outside, per_block)
    if blocks < 1 or rest:
        valid = [outside + per_block * count for count in (max(1, blocks), max(1, blocks) + 1)]
        raise RequestError(
            f"'{network}': depth = {depth} is not {outside} + {per_block} x blocks per stage; the nearest that are: "
            f"{valid[0]}, {valid[1]}"
        )
    return blocks


def kaiming_fan_out(network: nn.Module) -> nn.Module:
    """Draw every convolution's weights anew from N(0, 2 / (kernel area x output channels)); return the network."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
