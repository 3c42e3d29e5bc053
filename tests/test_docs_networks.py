"""docs/networks.md: every network, setting and default is in its table, and every parameter count is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from flatmin.labels import format_value
from flatmin.plugins import listing

PAGE = (Path(__file__).parents[1] / "docs" / "networks.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip(" `"): cells[1:]
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| `"
    )
}


def test_rows_are_the_listing() -> None:
    assert set(ROWS) == set(listing("network"))


@pytest.mark.parametrize("name", sorted(listing("network")))
def test_every_setting_is_named_with_its_default(name: str) -> None:
    told = dict(re.findall(r"`(\w+): ([^`]+)`", ROWS[name][0]))
    arguments = listing("network")[name].arguments
    assert told == {key: format_value(argument.default) for key, argument in arguments.items()}


def counts() -> list[tuple[str, dict[str, object], tuple[int, ...], int, int]]:
    """Return (network, settings, shape, classes, parameters) of every count in the table."""
    found = []
    for name, cells in ROWS.items():
        for entry in cells[2].split(";"):
            settings = yaml.safe_load((re.findall(r"`(\{.*\})`", entry) or ["{}"])[0])
            one = (1,) if "1 input" in entry else None
            shape = one or tuple(map(int, (re.findall(r"(\d+) x (\d+) x (\d+)", entry) or [(3, 32, 32)])[0]))
            classes = [int(number) for number in re.findall(r"(\d+) (?:classes|output)", entry)] or [10, 100]
            numbers = [int(text.replace(",", "")) for text in re.findall(r"\d{1,3}(?:,\d{3})+", entry)]
            assert numbers, entry
            found += [(name, settings, shape, c, number) for c, number in zip(classes, numbers, strict=False)]
    return found


def test_parameters_are_counted_right() -> None:
    wrong = []
    for name, settings, shape, classes, told in counts():
        with torch.device("meta"):
            network = listing("network")[name].load()(shape, classes, **settings)
        number = sum(parameter.numel() for parameter in network.parameters())
        wrong += [(name, settings, shape, classes, told, number)] if number != told else []
    assert wrong == []
