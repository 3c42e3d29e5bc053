"""What a program costs: parameters and arithmetic of its network, counted without training it.

Run as `python -m flatmin.trainables.cost`, with a JSON list of programs on the standard input, so that the
planner itself need not load torch.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flatmin.errors import FlatminError, RequestError
from flatmin.optimizers.compose import Composed
from flatmin.plugins import get, optimizer_parts
from flatmin.trainables.corruption import check_recipe, choose, missing_classes
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.job import load_dataset, plugin_settings
from flatmin.trainables.tasks import check_measure, check_outputs, check_recipes
from flatmin.trainables.trainer import check_split, network_builder

_GRADIENTS_PER_PRODUCT = 2.5
"""Cost of a Hessian-vector product on a kept graph, measured on a narrow ResNet-18 on one core."""


def cost(program: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a program costs, or `error`, or `refused`: why it cannot be trained.

    `n_params`, `train_size`, `test_size`; `flops` of one example's forward pass; `gradients`, the cost of an example's
    share of a training step in gradients; `notes`, what a person should know before it is trained.

    Args:
        program: Its settings; `measures`, if they are there, are labels that must go with its task.
    """
    parts = optimizer_parts(str(program["optimizer"]))
    composed = Composed(parts, {name: program[name] for part in parts for name in part.arguments})
    try:
        check_split(composed.rule, program["batch_size"])
    except RequestError as error:
        return {"refused": str(error)}
    try:
        dataset = load_dataset(plugin_settings("dataset", program))
    except (FlatminError, OSError) as error:
        return {"error": str(error)}
    try:
        left, notes = _examples(dataset, program)
        for text in program.get("measures", ()):
            check_measure(dataset.task, text)
        n_params, flops, outputs = _network_cost(
            plugin_settings("network", program), dataset.input_shape, dataset.classes
        )
        check_outputs(dataset, str(program["network"]), outputs)
    except RequestError as error:
        return {"refused": str(error)}
    batches = composed.rule.batches
    if not composed.rule.splits and batches > max(1, math.ceil(left / program["batch_size"])):
        return {
            "refused": f"a step of '{program['optimizer']}' takes {batches} batches, and {left} training examples make "
            f"{math.ceil(left / program['batch_size'])} of batch_size = {program['batch_size']}"
        }
    sizes = {"train_size": left, "test_size": len(dataset.test_x)}
    gradients = composed.rule.passes + _GRADIENTS_PER_PRODUCT * composed.products
    return {"n_params": n_params, "flops": flops, "gradients": gradients, "notes": notes, **sizes}


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


@cache
def _network_cost(
    settings: tuple[tuple[str, Any], ...], input_shape: tuple[int, ...], classes: int
) -> tuple[int, int, tuple[int, ...]]:
    """Return a network's parameters, the operations of a forward pass, and the shape of what it makes of an example."""
    with torch.device("meta"):
        network = network_builder(dict(settings), input_shape, classes)().eval()
        example = torch.empty(1, *input_shape)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        outputs = network(example)
    n_params = sum(parameter.numel() for parameter in network.parameters())
    return n_params, counter.get_total_flops(), tuple(outputs.shape[1:])


if __name__ == "__main__":
    read = json.load(sys.stdin)
    programs = [{name: tuple(v) if isinstance(v, list) else v for name, v in program.items()} for program in read]
    json.dump([cost(program) for program in programs], sys.stdout)
