"""From a document to the fields of a study: everything that does not fit is told, a line each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ValidationError

from flatmin import plugins
from flatmin.errors import nearest
from flatmin.orchestrator.document import Document, Place, shown
from flatmin.orchestrator.study_file import Case, Resources, Small, StudyFile

_NAMED = {
    "dict_type": "should be a mapping, name: value",
    "model_type": "should be a mapping, name: value",
    "string_type": "should be text; put it in quotes",
    "string_pattern_mismatch": "should be lower-case letters, digits, - and _, and begin with a letter or digit",
}
"""What pydantic's kinds of mistakes are called here."""

_ITS_OWN_PLACE = ("missing", "extra_forbidden")
"""Kinds whose place is a field's; that of others may go on with a type that was tried."""


def study_file(document: Document, problems: list[str]) -> StudyFile | None:
    """Return a study's fields; where some are wrong, those that are left, so that the rest can be checked too.

    Args:
        document: The study as written.
        problems: What is wrong is added here.

    Returns:
        None where nothing is left to check.
    """
    if not isinstance(document.data, dict):
        found = "the file is empty" if document.data is None else f"{shown(document.data)}"
        problems.append(f"{document.where(())}: {found}; a study is a mapping of {', '.join(StudyFile.model_fields)}")
        return None
    data = copy.deepcopy(document.data)
    for _ in range(2):
        try:
            return StudyFile.model_validate(data)
        except ValidationError as error:
            found_at: dict[Place, list[Any]] = {}
            for item in error.errors():
                place = item["loc"] if item["type"] in _ITS_OWN_PLACE else document.known(item["loc"])
                found_at.setdefault(place, []).append(item)
            for place, items in found_at.items():
                problems.append(_line(document, place, items))
                _drop(data, place)
            data.setdefault("study", "unnamed")
    return None


def _drop(data: Any, place: Place) -> None:
    """Take a faulty field out; a list with a faulty item goes as a whole, a faulty case becomes an empty one."""
    for at, (part, following) in enumerate(pairwise(place)):
        if isinstance(following, int) and part != "cases":
            place = place[: at + 1]
            break
    for part in place[:-1]:
        data = data[part]
    data.pop(place[-1], None) if isinstance(data, dict) else data.__setitem__(place[-1], {})


def _line(document: Document, place: Place, items: Sequence[Any]) -> str:
    """Return what is wrong with one field; the types that a field may have are told as one mistake."""
    unlike = "int_type" if isinstance(items[0]["input"], list) else "list_type"
    items = [item for item in items if item["type"] != unlike] or items
    where, kind, value = document.where(place), items[0]["type"], items[0]["input"]
    if kind == "extra_forbidden":
        return f"{where}: there is no such field.{_where_it_belongs(place)}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "too_short":
        return f"{where}: []: an axis needs at least one value"
    if value is None:
        return f"{where}: is empty; give it a value, or leave the line out"
    reasons = [_reason(item, place) for item in items]
    return f"{where}: {shown(value)}: {'; or '.join(dict.fromkeys(reasons))}"


def _reason(item: Any, place: Place) -> str:
    if item["type"] == "list_type":
        axis = len(place) > 1 and place[-2] == "axes"
        return f"should be a list, [{shown(item['input'])}]" + ("; one value is a setting" if axis else "")
    message: str = item["msg"].replace("Input should", "should").replace("Value error, ", "")
    return _NAMED.get(item["type"], f"{message[0].lower()}{message[1:]}")


def _where_it_belongs(place: Place) -> str:
    """Return the nearest field, or where a setting that stands among the fields belongs."""
    name = str(place[-1])
    fields = _fields(place[:-1])
    hint = nearest(name, fields)
    if "Did you mean" not in hint and "settings" in fields and name in _setting_names():
        return f" '{name}' is a setting: it stands under settings, or under axes with a list of values."
    return hint


def _fields(place: Place) -> dict[str, Any]:
    """Return the fields of the part of a study that stands at a place."""
    names = [part for part in place if isinstance(part, str)]
    parts: dict[str, type[BaseModel]] = {"resources": Resources, "cases": Case, "small": Small}
    return {**parts.get(names[-1] if names else "", StudyFile).model_fields}


def _setting_names() -> set[str]:
    kinds = ("network", "dataset", "optimizer", "training")
    found = (plugin.arguments for kind in kinds for plugin in plugins.listing(kind).values())
    return {"network", "dataset", "optimizer"}.union(*found)
