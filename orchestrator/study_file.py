"""A study as it is written: the fields of the YAML file, their types, and its small twin."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from flatmin.errors import RequestError


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a whole number or a list of them")
    return value


Seeds = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)],
    BeforeValidator(_no_bool),
]


class Resources(BaseModel):
    """What one trial is given while it runs; none of it is part of a model's identity."""

    model_config = ConfigDict(extra="forbid")

    cpus_per_trial: float = Field(default=1, gt=0)
    gpus_per_trial: float | Literal["auto"] = Field(default="auto")
    models_per_trial: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"


class Case(BaseModel):
    """One grid of a study: its settings and axes, over those of the whole study."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)


class Small(BaseModel):
    """The small twin of a study: its settings lie over the study's own, everything else stands in place of them."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = None
    cases: list[Case] | None = None
    seeds: Seeds | None = None
    measures: list[str] | None = None
    measure_every: Annotated[int, Field(ge=1)] | None = None


class StudyFile(Case):
    """A study as it is written."""

    study: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    about: str = ""
    source: str = ""
    seeds: Seeds = 1
    measures: list[str] = Field(default_factory=list)
    measure_every: Annotated[int, Field(ge=1)] | None = None
    cases: list[Case] = Field(default_factory=list)
    resources: Resources = Field(default_factory=Resources)
    small: Small | None = None

    def twin(self) -> StudyFile:
        """Return the study's small twin.

        Raises:
            RequestError: It has none.
        """
        if self.small is None:
            raise RequestError(f"the study '{self.study}' has no small twin: there is no field 'small' in it")
        study = self.model_dump(exclude={"small"})
        given = self.small.model_dump(exclude_none=True)
        for name, value in given.pop("settings").items():
            with_value(study, name, [value])
        return StudyFile.model_validate({**study, **given, "study": f"{self.study}-small"})


def with_value(study: dict[str, Any], name: str, values: list[Any]) -> None:
    """Give a setting these values in every grid of a study, whatever it had there; several make an axis."""
    for grid in (study, *study["cases"]):
        grid["settings"].pop(name, None)
        grid["axes"].pop(name, None)
    if len(values) == 1:
        study["settings"][name] = values[0]
    else:
        study["axes"][name] = values
