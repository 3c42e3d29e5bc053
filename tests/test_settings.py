"""Settings: canonical values, model ids that never change, and neutral values."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from flatmin.plugins import program_arguments
from flatmin.settings import Argument, Setting, digest, model_id


@pytest.mark.parametrize(
    ("annotation", "given", "expected"),
    [
        (float, "3e-3", 0.003),
        (float, 1, 1.0),
        (float, -0.0, 0.0),
        (int, "250", 250),
        (int, 8.0, 8),
        (bool, "true", True),
        (str, 5, "5"),
        (tuple[int, ...], [150, 200], (150, 200)),
        (int | None, None, None),
        (Literal["step", "cosine"], "step", "step"),
    ],
)
def test_canonical_values(annotation: Any, given: Any, expected: Any) -> None:
    value = Argument("x", annotation).canonical(given)
    assert value == expected
    assert type(value) is type(expected)
    assert str(value) == str(expected)


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        (float, "many"),
        (float, True),
        (float, float("nan")),
        (float, float("inf")),
        (int, 1.5),
        (int, False),
        (tuple[int, ...], 3),
    ],
)
def test_values_of_another_type_are_refused(annotation: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=r"should|must"):
        Argument("x", annotation).canonical(given)


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0])
def test_bounds(value: float) -> None:
    argument = Argument("x", float, 0.5, Setting(ge=0, lt=1))
    with pytest.raises(ValueError, match="should be"):
        argument.canonical(value)
    assert argument.canonical(0.0) == 0.0


def test_bounds_hold_for_each_number_of_a_list() -> None:
    with pytest.raises(ValueError, match="should be"):
        Argument("x", tuple[int, ...], (), Setting(ge=1)).canonical([3, 0])


NAMES = {"dataset": "digits", "network": "mlp", "optimizer": "sgd"}


def settings(**changes: Any) -> dict[str, Any]:
    defaults = {name: argument.default for name, argument in program_arguments(NAMES).items()}
    seeds = {"init_seed": 0, "order_seed": 0, "noise_seed": 0}
    return {**NAMES, **defaults, **seeds, **changes}


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({}, "eb6167213a277a5f"),
        ({"lr": 0.003, "width": 128}, "3386331829586965"),
        (
            {"seed": 4, "init_seed": 4, "order_seed": 4, "noise_seed": 4, "milestones": (3, 5)},
            "1655612f2dee2f83",
        ),
    ],
)
def test_frozen_model_ids(changes: dict[str, Any], frozen: str) -> None:
    """Ids of version 0.1; results directories hold them, so they may never change."""
    assert model_id(settings(**changes), program_arguments(NAMES)) == frozen


def test_id_ignores_the_order_of_keys_and_how_a_number_is_written() -> None:
    arguments = program_arguments(NAMES)
    one = settings(lr=arguments["lr"].canonical("1e-2"), width=arguments["width"].canonical("8"))
    other = dict(
        reversed(settings(lr=arguments["lr"].canonical(0.01), width=arguments["width"].canonical(8.0)).items())
    )
    assert model_id(one, arguments) == model_id(other, arguments)


def test_every_setting_is_in_the_id() -> None:
    arguments = program_arguments(NAMES)
    base = model_id(settings(), arguments)
    for name, argument in arguments.items():
        value: Any = {int: 7, float: 0.123, bool: not argument.default}.get(argument.annotation, "other")
        assert model_id(settings(**{name: value}), arguments) != base, name


def test_a_later_setting_at_its_neutral_value_keeps_old_ids() -> None:
    arguments = program_arguments(NAMES)
    later = {**arguments, "clip": Argument("clip", float, 0.0, Setting(neutral=0.0))}
    assert model_id(settings(clip=0.0), later) == model_id(settings(), arguments)
    assert model_id(settings(clip=1.0), later) != model_id(settings(), arguments)


def test_digest_tells_values_apart() -> None:
    assert len({digest(value) for value in (0, 1, 1.5, "1", None, [1], {"a": 1}, {"b": 1})}) == 8
