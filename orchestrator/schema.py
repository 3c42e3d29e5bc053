"""A study file as JSON Schema (draft 2020-12), by which editors complete and check it while it is typed.

The fields come from `flatmin.orchestrator.study_file`, settings and names from the plug-ins that are installed, the
user's own among them. What a schema cannot say (which plug-in takes which setting, what measures take in brackets)
`plan` checks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from flatmin import plugins
from flatmin.errors import RequestError
from flatmin.files import write_atomically
from flatmin.labels import format_value
from flatmin.orchestrator.grid import NAMES
from flatmin.orchestrator.study_file import StudyFile
from flatmin.settings import REQUIRED, Argument

SCHEMA_FILE = "study.schema.json"
"""The name under which `flatmin-sweep new` looks for a schema beside the study it writes."""


def study_schema() -> dict[str, Any]:
    """Return the JSON Schema of a study file; its settings are those of the plug-ins that are installed."""
    schema = StudyFile.model_json_schema(schema_generator=_Untitled)
    settings = {**{name: _plugin_names(name) for name in NAMES}, **_settings()}
    parts = {
        "settings": {
            "type": "object",
            "description": "Settings with one value each.",
            "properties": {name: _reference(name) for name in settings},
            "additionalProperties": False,
        },
        "axes": {
            "type": "object",
            "description": "Settings with several values each; the grid is the product of the axes and the seeds.",
            "properties": {name: {"type": "array", "minItems": 1, "items": _reference(name)} for name in settings},
            "additionalProperties": False,
        },
        "measures": _measures(),
    }
    for owner in (schema, *schema["$defs"].values()):
        for name, field in owner["properties"].items():
            owner["properties"][name] = _reference(name) if name in parts else _not_null(field)
    schema["$defs"].update(settings | parts)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "flatmin-sweep study", **schema}


def write_schema(file: str | Path) -> Path:
    """Write the JSON Schema of a study file.

    Raises:
        RequestError: The file cannot be written.
    """
    file = Path(file)
    try:
        write_atomically(file, (json.dumps(study_schema(), indent=2) + "\n").encode())
    except OSError as error:
        raise RequestError(f"'{file}' cannot be written: {error.strerror}") from None
    return file


class _Untitled(GenerateJsonSchema):
    """Without the titles that repeat the fields' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _not_null(field: dict[str, Any]) -> dict[str, Any]:
    """Return what a field may be when it is written down; left out is another matter."""
    kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
    if not kinds or len(kinds) == len(field["anyOf"]):
        return field
    rest = {name: value for name, value in field.items() if name != "anyOf" and value is not None}
    return {**kinds[0], **rest} if len(kinds) == 1 else {"anyOf": kinds, **rest}


def _plugin_names(kind: str) -> dict[str, Any]:
    listed = plugins.listing(kind)
    names = plugins.optimizer_names() if kind == "optimizer" else list(listed)
    about = "\n".join(f"- {plugin.name}: {plugin.about}" for plugin in listed.values())
    how = "A base, or a rule over a base:" if kind == "optimizer" else f"The {kind}:"
    return {"enum": names, "description": f"{how}\n{about}"}


def _settings() -> dict[str, Any]:
    declared: dict[str, list[tuple[str, Argument]]] = {}
    for kind in (*NAMES, "training"):
        for plugin in plugins.listing(kind).values():
            for name, argument in plugin.arguments.items():
                declared.setdefault(name, []).append((plugin.name, argument))
    return {name: _setting(found) for name, found in declared.items()}


def _setting(declared: list[tuple[str, Argument]]) -> dict[str, Any]:
    """Return the schema of one setting, which several plug-ins may declare with bounds and defaults of their own."""
    kinds: list[dict[str, Any]] = []
    for _, argument in declared:
        kind = argument.json_schema()
        kinds += [kind] if kind not in kinds else []
    schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    first = declared[0][1]
    defaults = [argument.default for _, argument in declared]
    if first.default is not REQUIRED and all(default == first.default for default in defaults):
        schema = {**schema, "default": first.default}
    return {**schema, "description": " ".join(_description(declared))}


def _description(declared: list[tuple[str, Argument]]) -> Iterator[str]:
    setting = declared[0][1].setting
    yield setting.about
    if setting.unit:
        yield f"Unit: {setting.unit}."
    takers = [
        name if argument.default in (None, REQUIRED) else f"{name} (default {format_value(argument.default)})"
        for name, argument in declared
    ]
    if declared[0][0] != "training":
        yield f"Of {', '.join(takers)}."


def _measures() -> dict[str, Any]:
    """Return the schema of a list of measures.

    YAML cuts `[lpf(data=test, sigma=0.1)]` at the comma, so `sigma=0.1)` is an item too.
    """
    listed = plugins.listing("measure")
    common = plugins.get("subject", "subject").arguments
    arguments = sorted({*common, *(name for plugin in listed.values() for name in plugin.arguments)})
    names, keys = ("|".join(map(re.escape, found)) for found in (listed, arguments))
    about = "\n".join(f"- {plugin.name}: {plugin.about}" for plugin in listed.values())
    return {
        "type": "array",
        "description": f"Measures of every trained model, such as lpf or lpf(sigma=0.002):\n{about}",
        "items": {
            "type": "string",
            "pattern": rf"^\s*({names})\s*(\(.*)?$|^\s*({keys})\s*=.*$",
            "examples": list(listed),
        },
    }
