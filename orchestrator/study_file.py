"""A study as it is written: the fields of the YAML file, their types, and its small twin."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from flatmin.errors import RequestError

NAME = r"^[a-z0-9][a-z0-9_-]*$"
"""What the name of a study looks like."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


_LARGEST = 2**62
"""Of whole numbers: they fit in 64 bits, and so does a range of them."""

Count = Annotated[int, Field(ge=1, le=_LARGEST), BeforeValidator(_no_bool)]
Seed = Annotated[int, Field(ge=0, le=_LARGEST), BeforeValidator(_no_bool)]
Seeds = Annotated[
    Count | Annotated[list[Seed], Field(min_length=1)],
    Field(description="How many seeds, from 0 on, or a list of them; every model is trained once with each."),
]
Settings = Annotated[dict[str, Any], Field(description="Settings with one value each.")]
Axes = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=1)]],
    Field(description="Settings with several values each; the grid is the product of the axes and the seeds."),
]
Measures = Annotated[list[str], Field(description="Measures of every trained model: lpf, or lpf(sigma=0.002).")]
Every = Annotated[
    Count, Field(description="Take the measures at every n-th epoch as well, not at the end of training alone.")
]


class Resources(BaseModel):
    """What one trial is given while it runs; none of it is part of a model's identity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    cpus_per_trial: Annotated[float, BeforeValidator(_no_bool)] = Field(
        default=1, gt=0, description="Cores of one trial."
    )
    gpus_per_trial: Annotated[float, Field(ge=0), BeforeValidator(_no_bool)] | Literal["auto"] = Field(
        default="auto", description="GPUs of one trial, or a share of one; auto: one where there is one."
    )
    models_per_trial: Count | Literal["auto"] = Field(default="auto", description="The largest stack.")


class Grid(BaseModel):
    """Settings and axes: what is multiplied out."""

    model_config = ConfigDict(extra="forbid")

    settings: Settings = Field(default_factory=dict)
    axes: Axes = Field(default_factory=dict)


class Case(Grid):
    """One grid of a study: its settings and axes over those of the whole study, its measures in place of them."""

    measures: Measures | None = None


Cases = Annotated[list[Case], Field(description="Several grids in one study, over its settings and axes.")]


class Small(BaseModel):
    """The small twin of a study: its settings lie over the study's own, everything else stands in place of them."""

    model_config = ConfigDict(extra="forbid")

    settings: Settings = Field(default_factory=dict)
    axes: Axes | None = None
    cases: Cases | None = None
    seeds: Seeds | None = None
    measures: Measures | None = None
    measure_every: Every | None = None


class StudyFile(Grid):
    """A study as it is written."""

    study: str = Field(pattern=NAME, description="The study's name, which its results carry.")
    about: str = Field(default="", description="What it asks, in a sentence.")
    source: str = Field(default="", description="Where it comes from: paper, section, table.")
    seeds: Seeds = 1
    measures: Measures = Field(default_factory=list)
    measure_every: Every | None = None
    cases: Cases = Field(default_factory=list)
    resources: Resources = Field(default_factory=Resources, description="What one trial is given while it runs.")
    small: Small | None = Field(default=None, description="The study's small twin, which --small runs.")

    def twin(self) -> StudyFile:
        """Return the study's small twin.

        Raises:
            RequestError: It has none.
        """
        if self.small is None:
            raise RequestError(f"the study '{self.study}' has no small twin: there is no field 'small' in it")
        study = self.model_dump(exclude={"small"})
        given = self.small.model_dump(exclude_none=True)
        for name in given.get("axes", {}):
            study["settings"].pop(name, None)
        for name, value in given.pop("settings").items():
            with_value(study, name, [value])
        if self.small.seeds is not None:
            with_seeds(study, self.small.seeds)
        if self.small.measures is not None:
            with_measures(study, self.small.measures)
        return StudyFile.model_validate({**study, **given, "study": f"{self.study}-small"})


def with_seeds(study: dict[str, Any], seeds: Any) -> None:
    """Give every grid of a study these seeds, whatever it had."""
    for grid in (study, *study["cases"]):
        grid["settings"].pop("seed", None)
        grid["axes"].pop("seed", None)
    study["seeds"] = seeds


def with_measures(study: dict[str, Any], labels: list[str]) -> None:
    """Give every grid of a study these measures, whatever it had."""
    study["measures"] = labels
    for case in study["cases"]:
        case["measures"] = None


def with_value(study: dict[str, Any], name: str, values: list[Any]) -> None:
    """Give a setting these values in every grid of a study, whatever it had there; several make an axis."""
    for grid in (study, *study["cases"]):
        grid["settings"].pop(name, None)
        grid["axes"].pop(name, None)
    if len(values) == 1:
        study["settings"][name] = values[0]
    else:
        study["axes"][name] = values
    if name == "seed":
        study["seeds"] = 1
