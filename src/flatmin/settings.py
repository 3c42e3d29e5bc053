"""Settings: how a plug-in declares one, and how a value given by a person becomes canonical.

A plug-in declares a setting once, as a keyword-only argument of its entry function:

    lr: Annotated[float, Setting(unit="1 / step", gt=0, per_model=True)] = 0.1

From that come the YAML schema, the command-line override, the column and the documentation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

REQUIRED: Any = ...
"""Marks an argument without a default."""


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a setting means, beside its type.

    Attributes:
        about: One sentence for the documentation.
        unit: The unit of the value; empty for a pure number or a name.
        ge, gt, le, lt: Bounds of a number (of each number, in a list).
        per_model: Models of one stack may differ in it.
        neutral: For a setting added in a later version: the value at which a model is what it was
            before, and which therefore stays out of `model_id`.
    """

    about: str = ""
    unit: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    per_model: bool = False
    neutral: Any = UNSET

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by their names."""
        given = {"ge": self.ge, "gt": self.gt, "le": self.le, "lt": self.lt}
        return {name: bound for name, bound in given.items() if bound is not None}


@dataclass(frozen=True)
class Argument:
    """One declared setting: its name, type, default and meaning.

    Attributes:
        name: The flat name used everywhere.
        annotation: The Python type without `Annotated`.
        default: The default value, or `REQUIRED`.
        setting: What the declaration says of it.
    """

    name: str
    annotation: Any
    default: Any = REQUIRED
    setting: Setting = field(default_factory=Setting)

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        bounds: dict[str, Any] = dict(self.setting.bounds)
        annotation, origin = self.annotation, get_origin(self.annotation)
        if bounds and origin is tuple:
            annotation = origin[Annotated[get_args(annotation)[0], Field(**bounds)], ...]
        elif bounds:
            annotation = Annotated[annotation, Field(**bounds)]
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))

    def canonical(self, value: Any) -> Any:
        """Return the value in its declared type.

        Raises:
            ValueError: The value has another type or lies outside the bounds; the message is one clause.
        """
        if value is None or value == "none":
            if type(None) in get_args(self.annotation):
                return None
            if value is None:
                raise ValueError(f"should be {self.type_name}")
        wrong = [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, bool)]
        if wrong and not {int, float}.isdisjoint((self.annotation, *get_args(self.annotation))):
            raise ValueError(f"must be a number, not {str(wrong[0]).lower()}")
        if self.annotation is str and isinstance(value, int | float):
            value = str(value)
        try:
            result = self._adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(_clause(error)) from None
        numbers = result if isinstance(result, tuple) else (result,)
        if any(isinstance(number, int) and abs(number) >= 2**63 for number in numbers):
            raise ValueError("should fit in 64 bits")
        return result + 0.0 if isinstance(result, float) else result

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the values it takes: type, bounds, choices; `none` is null or the text."""
        schema = self._adapter.json_schema()
        if type(None) in get_args(self.annotation):
            schema["anyOf"].append({"const": "none"})
        return schema

    @property
    def type_name(self) -> str:
        """The type as a person writes it: `float`, `list of int`, `constant | step | cosine`."""
        origin, args = get_origin(self.annotation), get_args(self.annotation)
        if origin is tuple:
            return f"list of {args[0].__name__}"
        if args:
            return " | ".join("none" if arg is type(None) else getattr(arg, "__name__", str(arg)) for arg in args)
        return str(self.annotation.__name__)


def _clause(error: ValidationError) -> str:
    message = error.errors()[0]["msg"].replace("Input should", "should")
    return message[0].lower() + message[1:]


def model_id(settings: Mapping[str, Any], arguments: Mapping[str, Argument]) -> str:
    """Return the 16 hex digits that name a model.

    Args:
        settings: Canonical settings of the model, defaults filled in.
        arguments: The declarations of those settings. One at its neutral value stays out of the hash, so
            ids from before it was introduced live on.
    """
    hashed = {
        name: value
        for name, value in settings.items()
        if name not in arguments or arguments[name].setting.neutral is UNSET or value != arguments[name].setting.neutral
    }
    return digest(hashed)


def digest(value: Any) -> str:
    """Return 16 hex digits of a hash of plain data, whatever the order of its keys.

    >>> digest({"a": 1, "b": [0.1, 2]}) == digest({"b": (1e-1, 2), "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
