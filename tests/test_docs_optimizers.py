"""docs/optimizers.md: every example runs and trains, and every rule, base, setting, default and pair is in it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from flatmin.labels import format_value
from flatmin.plugins import Plugin, listing, optimizer_names, program_arguments

PAGE = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text(encoding="utf-8")
INTRODUCTION, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SECTIONS = {
    re.sub("`", "", title): text
    for title, text in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
PARTS = listing("optimizer")
BASES = [name for name, part in PARTS.items() if part.returns in ("Base", "SecondOrderBase")]
RULES = [name for name, part in PARTS.items() if part.returns in ("Rule", "FirstOrderRule")]


def title_of(example: str) -> str:
    (name,) = set(re.findall(r'TorchOptimizer\("([\w-]+)"', example))
    return str(name)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.fixture
def namespace() -> dict[str, Any]:
    """Return what the page's introduction defines."""
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(INTRODUCTION, names)
    return names


@pytest.mark.parametrize("example", EXAMPLES, ids=title_of)
def test_example_trains(example: str, namespace: dict[str, Any]) -> None:
    """From fresh weights, one run of the example lowers the loss on its data."""
    model = namespace["model"]
    x, y = namespace["digits"].tensors

    def loss() -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(copy.deepcopy(model)(x), y))

    before, started = loss(), flat(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(example, namespace)
    assert not torch.equal(flat(model), started)
    assert loss() < 0.8 * before
    assert namespace["optimizer"].count > 0
    if "loss" in namespace:
        assert torch.isfinite(namespace["loss"])


@pytest.mark.parametrize("part", PARTS.values(), ids=lambda part: part.name)
def test_every_setting_is_named_with_its_default(part: Plugin) -> None:
    section = SECTIONS[part.name]
    (settings,) = re.findall(r"^Settings: (.*?)\n\n", section, re.DOTALL | re.MULTILINE)
    told = re.findall(r"`(\w+)` = (\S+?)[.,]?(?:\s|$)", settings)
    assert dict(told) == {key: format_value(argument.default) for key, argument in part.arguments.items()}
    assert re.search(rf'TorchOptimizer\("(\w+-)?{part.name}(-\w+)?"', section), "the section has an example"


def test_sections_are_the_listing() -> None:
    assert set(SECTIONS) == set(BASES) | set(RULES)


def test_the_table_of_pairs_is_what_exists() -> None:
    bases = re.findall(r"`(\w+)`", re.findall(r"^\| \| (.*) \|$", PAGE, re.MULTILINE)[0])
    assert sorted(bases) == sorted(BASES)
    told = set()
    for rules, answers in re.findall(r"^\| ([^|]+) \|((?: (?:yes|no) \|)+)$", PAGE, re.MULTILINE):
        named = re.findall(r"`(\w+)`", rules)
        for base, answer in zip(bases, answers.strip(" |").split(" | "), strict=True):
            told |= {f"{rule}-{base}" for rule in named if answer == "yes"}
            told |= {base} if "plain" in rules and answer == "yes" else set()
    assert told == set(optimizer_names())


@pytest.mark.parametrize("row", re.findall(r"^\| .*optimizer: .* \|$", PAGE, re.MULTILINE))
def test_published_settings_exist(row: str) -> None:
    """Every setting of the last table is one of its optimizer, or of training, and takes the value."""
    (text,) = re.findall(r"`(.*)`", row)
    settings = yaml.safe_load(f"{{{text}}}")
    arguments = program_arguments({"optimizer": settings.pop("optimizer")})
    for key, value in settings.items():
        arguments[key].canonical(value)
