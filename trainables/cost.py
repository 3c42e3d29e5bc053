"""What a program costs: parameters and arithmetic of its network, counted without training it.

Run as `python -m flatmin.trainables.cost`, with a JSON list of programs on the standard input, so that the
planner itself need not load torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flatmin.errors import FlatminError
from flatmin.trainables.job import load_dataset, plugin_settings
from flatmin.trainables.trainer import network_builder


def cost(program: Mapping[str, Any]) -> dict[str, Any]:
    """Return `n_params`, `train_size`, `test_size` and `flops` of one example's forward pass, or `error`."""
    try:
        dataset = load_dataset(plugin_settings("dataset", program))
    except (FlatminError, OSError) as error:
        return {"error": str(error)}
    n_params, flops = _network_cost(plugin_settings("network", program), dataset.input_shape, dataset.classes)
    sizes = {"train_size": len(dataset.train_x) - int(program["val_size"]), "test_size": len(dataset.test_x)}
    return {"n_params": n_params, "flops": flops, **sizes}


@cache
def _network_cost(settings: tuple[tuple[str, Any], ...], input_shape: tuple[int, ...], classes: int) -> tuple[int, int]:
    """Return the parameters of a network and the operations of a forward pass; most programs share theirs."""
    with torch.device("meta"):
        network = network_builder(dict(settings), input_shape, classes)().eval()
        example = torch.empty(1, *input_shape)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(example)
    return sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops()


if __name__ == "__main__":
    json.dump([cost(program) for program in json.load(sys.stdin)], sys.stdout)
