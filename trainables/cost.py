"""What a program costs: parameters and arithmetic of its network, counted without training it.

Run as `python -m flatmin.trainables.cost`, with a JSON list of programs on the standard input, so that the
planner itself need not load torch.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flatmin.errors import FlatminError, MissingData, RequestError
from flatmin.optimizers.compose import Composed
from flatmin.plugins import get, optimizer_parts
from flatmin.stack import StackedNetwork
from flatmin.trainables.corruption import check_recipe, choose, missing_classes
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.job import load_dataset, plugin_settings
from flatmin.trainables.known_data import of_size, published_size
from flatmin.trainables.tasks import check_measure, check_outputs, check_recipes
from flatmin.trainables.trainer import check_split, network_builder

_GRADIENTS_PER_PRODUCT = 2.5
"""Cost of a Hessian-vector product on a kept graph, measured on a narrow ResNet-18 on one core."""


def cost(program: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a program costs, or `error`, or `refused`: why it cannot be trained.

    `n_params`, `train_size`, `val_size`, `test_size`; `flops` of one example's forward pass, and `layers`, how many
    there are; `loops`, whether models of a stack go through it one after another on a CPU; `chain_outputs`, how many
    outputs a chain of linear layers and ReLUs has, 0 of any other network; `gradients`, the cost of an example's share
    of a training step in gradients; `batches`, how many times `batch_size` examples a step takes; `notes`, what a
    person should know before it is trained; `assumed`, what stands in for data that are not here.

    Args:
        program: Its settings; `measures`, if they are there, are labels that must go with its task.
    """
    parts = optimizer_parts(str(program["optimizer"]))
    composed = Composed(parts, {name: program[name] for part in parts for name in part.arguments})
    try:
        check_split(composed.rule, program["batch_size"])
    except RequestError as error:
        return {"refused": str(error)}
    assumed = ""
    try:
        dataset = load_dataset(plugin_settings("dataset", program), stand_in=program["stand_in"])
    except RequestError as error:
        return {"refused": str(error)}
    except MissingData as error:
        size = published_size(program)
        if size is None:
            return {"error": str(error)}
        dataset, assumed = of_size(size), f"{error.found}; its published size is taken"
    except (FlatminError, OSError) as error:
        return {"error": str(error)}
    try:
        left, notes = _examples(dataset, program)
        for text in program.get("measures", ()):
            _checked_measure(dataset.task, text)
        network = network_cost(plugin_settings("network", program), dataset.input_shape, dataset.classes)
        check_outputs(dataset, str(program["network"]), network.outputs)
    except RequestError as error:
        return {"refused": str(error)}
    batches = composed.rule.batches
    if not composed.rule.splits and batches > max(1, math.ceil(left / program["batch_size"])):
        return {
            "refused": f"a step of '{program['optimizer']}' takes {batches} batches, and {left} training examples make "
            f"{math.ceil(left / program['batch_size'])} of batch_size = {program['batch_size']}"
        }
    return {
        "n_params": network.n_params,
        "flops": network.flops,
        "layers": network.layers,
        "loops": network.loops,
        "chain_outputs": network.chain_outputs,
        "train_size": left,
        "val_size": program["val_size"],
        "test_size": len(dataset.test_y),
        "gradients": composed.rule.passes + _GRADIENTS_PER_PRODUCT * composed.products,
        "batches": 1 if composed.rule.splits else batches,
        "notes": notes,
        "assumed": assumed,
    }


def _examples(dataset: Dataset, program: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return how many examples a program trains on, and what a person should know of those held out.

    Raises:
        RequestError: The data set cannot be split or corrupted like that.
    """
    plugin = get("training", "training")
    recipe = plugin.load()(**{name: program[name] for name in plugin.arguments})
    check_recipe(dataset, recipe)
    check_recipes(dataset.task, [recipe])
    left, held_out = choose(dataset, recipe)
    missing = missing_classes(dataset, held_out) if len(held_out) else []
    if not missing:
        return len(left), []
    return len(left), [
        f"none of the val_size = {recipe.val_size} examples held out is of class {missing[0]}; {len(missing)} of "
        f"{dataset.classes} classes are missing, so val_acc says nothing of them; raise val_size or change split_seed"
    ]


_checked_measure = cache(check_measure)
"""A study asks the same measures of every program."""


@dataclass(frozen=True)
class NetworkCost:
    """The arithmetic of a network.

    Attributes:
        n_params: Its weights.
        flops: Floating-point operations of one example's forward pass, two for each product that is added up: those of
            linear maps, convolutions and attention, as torch counts them.
        layers: Modules without others in them.
        outputs: The shape of what it makes of an example.
        loops: Whether the models of a stack go through it one after another on a CPU.
        chain_outputs: How many outputs a chain of linear layers and ReLUs has; 0 of any other network.
    """

    n_params: int
    flops: int
    layers: int
    outputs: tuple[int, ...]
    loops: bool
    chain_outputs: int


@cache
def network_cost(settings: tuple[tuple[str, Any], ...], input_shape: tuple[int, ...], classes: int) -> NetworkCost:
    """Count what one example costs in a network, without numbers.

    Args:
        settings: The network's name and the settings it takes.
        input_shape: The shape of an example.
        classes: How many outputs it has.
    """
    with torch.device("meta"):
        network = network_builder(dict(settings), input_shape, classes)().eval()
        example = torch.empty(1, *input_shape)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        outputs = network(example)
    stacked = StackedNetwork(network)
    return NetworkCost(
        n_params=sum(parameter.numel() for parameter in network.parameters()),
        flops=counter.get_total_flops(),
        layers=sum(not list(module.children()) for module in network.modules()),
        outputs=tuple(outputs.shape[1:]),
        loops=stacked.loops(torch.device("cpu")),
        chain_outputs=0 if stacked.chain is None else stacked.chain.n_outputs,
    )


if __name__ == "__main__":
    read = json.load(sys.stdin)
    programs = [{name: tuple(v) if isinstance(v, list) else v for name, v in program.items()} for program in read]
    json.dump([cost(program) for program in programs], sys.stdout)
