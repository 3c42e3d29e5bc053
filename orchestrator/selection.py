"""A part of a study: the models whose settings have given values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from flatmin.errors import RequestError, nearest
from flatmin.labels import split_list
from flatmin.settings import Argument
from flatmin.trial import Model


def selected(models: Mapping[str, Model], arguments: Mapping[str, Argument], only: Sequence[str]) -> dict[str, Model]:
    """Return the models that agree with every condition.

    Args:
        models: The models of a study by id.
        arguments: The declaration of every setting that some of them take, plug-in names apart.
        only: Conditions `setting=value` or `setting=value,value`.

    Raises:
        RequestError: A condition cannot be read, names no setting of the study, or is true of none of its models.
    """
    left = dict(models)
    for text in only:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise RequestError(f"--only {text}: should read setting=value or setting=value,value")
        there = {name for model in models.values() for name in model.settings}
        if name not in there:
            raise RequestError(f"--only {text}: no model of this study has a setting '{name}'.{nearest(name, there)}")
        wanted = [_canonical(text, arguments.get(name), part) for part in split_list(value)]
        values = list(dict.fromkeys(str(model.settings[name]) for model in left.values() if name in model.settings))
        left = {key: model for key, model in left.items() if model.settings.get(name) in wanted}
        if not left:
            raise RequestError(f"--only {text}: no such model; {name} is one of: {', '.join(values) or 'nothing'}")
    return left


def _canonical(text: str, argument: Argument | None, value: str) -> Any:
    """Return a value as models have it; names of plug-ins are text."""
    if argument is None:
        return value
    try:
        return argument.canonical(yaml.safe_load(value))
    except (yaml.YAMLError, ValueError) as error:
        raise RequestError(f"--only {text}: {value!r}: {error} ({argument.type_name})") from None
