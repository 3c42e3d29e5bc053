"""A setting's name means one thing, with one type and one unit, in the whole package."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pytest

from flatmin import plugins
from flatmin.settings import Argument, Setting
from flatmin.tables import TABLES, fixed_columns

OF_MODELS = ("network", "dataset", "optimizer", "training")
KINDS = (*OF_MODELS, "measure", "subject")
NAMING_A_PLUGIN = {"network", "dataset", "optimizer"}
SETTING_AND_COLUMN = {"lr"}
"""`epochs.lr` is the rate that `lr` and the schedule give in that epoch: the same thing, in the same unit."""


def declarations(kinds: Iterable[str] = KINDS) -> list[tuple[str, Argument]]:
    """Return (where, argument) of every setting that plug-ins of these kinds take."""
    return [
        (f"{kind} {plugin.name}", argument)
        for kind in kinds
        for plugin in plugins.listing(kind).values()
        for argument in plugin.arguments.values()
    ]


def disagreements(declared: Iterable[tuple[str, Argument]]) -> list[str]:
    """Return the settings whose declarations differ in type, unit or, for those of models, `per_model`, and where."""
    declared = list(declared)
    per_model = {argument.name for where, argument in declared if argument.setting.per_model}
    places: dict[str, dict[tuple[str, str, bool], list[str]]] = defaultdict(lambda: defaultdict(list))
    for where, argument in declared:
        of_measure = where.startswith(("measure ", "subject "))  # a measure's arguments are the same for all models
        own = argument.name in per_model if of_measure else argument.setting.per_model
        places[argument.name][str(argument.annotation), argument.setting.unit, own].append(where)
    return [f"{name}: {dict(meanings)}" for name, meanings in places.items() if len(meanings) > 1]


def test_there_are_plugins_of_every_kind() -> None:
    assert {kind for kind in KINDS if not plugins.listing(kind)} == set()


def test_a_name_means_one_thing() -> None:
    assert disagreements(declarations()) == []


@pytest.mark.parametrize(
    "other",
    [
        Argument("rho", int, 1, Setting(unit="norm", per_model=True)),
        Argument("rho", float, 1.0, Setting(unit="fraction", per_model=True)),
        Argument("rho", float, 1.0, Setting(unit="norm")),
    ],
    ids=["type", "unit", "per_model"],
)
def test_a_second_meaning_is_found(other: Argument) -> None:
    first = Argument("rho", float, 0.05, Setting(unit="norm", per_model=True))
    assert disagreements([("a", first), ("b", first)]) == []
    assert len(disagreements([("a", first), ("b", other)])) == 1


def test_no_setting_takes_the_name_of_a_column() -> None:
    columns = {name for table in TABLES for name in fixed_columns(table)} | NAMING_A_PLUGIN
    assert {argument.name for _, argument in declarations(OF_MODELS)} & columns <= SETTING_AND_COLUMN


def test_no_setting_takes_the_name_of_a_measure() -> None:
    """`wide` has a column per measure label beside a column per setting."""
    assert {argument.name for _, argument in declarations(OF_MODELS)} & set(plugins.listing("measure")) == set()


def test_settings_of_the_contract_exist() -> None:
    contract = {
        "seed",
        "init_seed",
        "order_seed",
        "noise_seed",
        "batch_size",
        "epochs",
        "milestones",
        "stop_loss",
    }
    contract |= {"label_noise", "data_noise", "precision", "width", "lr", "momentum", "weight_decay", "rho"}
    assert contract <= {argument.name for _, argument in declarations(OF_MODELS)}


def test_every_setting_says_what_it_is() -> None:
    silent = [f"{where}: {argument.name}" for where, argument in declarations() if not argument.setting.about]
    assert silent == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_plugin_says_what_it_is(kind: str) -> None:
    assert [plugin.name for plugin in plugins.listing(kind).values() if not plugin.about] == []
