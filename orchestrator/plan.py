"""The plan: a study's models, the stacks they form, and what of it is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from flatmin.errors import RequestError
from flatmin.labels import parse_label
from flatmin.orchestrator.grid import MOST_MODELS
from flatmin.orchestrator.study import Study, read_study
from flatmin.settings import Argument
from flatmin.trial import Model, Trial, missing_of

LARGEST_AUTO_STACK = 40
"""Models of one stack when `models_per_trial` is `auto`: enough to fill the arithmetic, few enough to lose little."""


@dataclass(frozen=True)
class Plan:
    """What a study asks for.

    Attributes:
        study: The study's name.
        trials: The stacks of the whole study; a function of the study and `models_per_trial` alone.
    """

    study: str
    trials: tuple[Trial, ...]

    @property
    def models(self) -> tuple[Model, ...]:
        """Every model, stack by stack."""
        return tuple(model for trial in self.trials for model in trial.models)


def make_plan(study: Study, models_per_trial: int | Literal["auto"] | None = None) -> Plan:
    """Partition a study into stacks.

    Models may share a stack when they agree in every setting that is not `per_model`, and in what is measured. A group
    larger than `models_per_trial` is cut into stacks of nearly equal size. Groups are ordered by model id, so the order
    in which a study lists its values changes neither a stack's members nor their places.

    Args:
        study: The study.
        models_per_trial: The largest stack; the study's own choice when None.

    Raises:
        RequestError: A measure is asked of examples that are not held out.
    """
    chosen = study.file.resources.models_per_trial if models_per_trial is None else models_per_trial
    largest = LARGEST_AUTO_STACK if chosen == "auto" else chosen
    for asked in set(study.measures_of.values()):
        check_sets(asked, [model for model in study.models if study.measures_of[model.model_id] == asked])
    groups: dict[tuple[Any, ...], list[Model]] = {}
    for model in study.models:
        labels = study.measures_of[model.model_id]
        groups.setdefault((labels, *program_key(model, study.arguments)), []).append(model)
    trials = [
        Trial(study.name, tuple(members), labels, measure_every=study.file.measure_every)
        for (labels, *_), group in groups.items()
        for members in _even_parts(sorted(group, key=lambda model: model.model_id), largest)
    ]
    return Plan(study.name, tuple(trials))


def check_sets(labels: Sequence[str], models: Sequence[Model]) -> None:
    """Refuse measures on the validation set of models that have none.

    Raises:
        RequestError: There is one.
    """
    without = next((model for model in models if model.settings.get("val_size") == 0), None)
    for label in labels:
        if without is not None and parse_label(label).common["data"] == "val":
            raise RequestError(
                f"'{label}': model {without.model_id} holds no examples out (val_size = 0), so it has no 'val' set to "
                "measure on; there are: train, test"
            )


def plan(
    study: str,
    overrides: Sequence[str] = (),
    models_per_trial: int | Literal["auto"] | None = None,
    *,
    small: bool = False,
    only: Sequence[str] = (),
    at_most: int | None = MOST_MODELS,
) -> Plan:
    """Read a study and partition it into stacks; train nothing.

    Args:
        study: A built-in study's name, or the path of a YAML file.
        overrides: `setting=value` or `setting=value,value`.
        models_per_trial: The largest stack; the study's own choice when None.
        small: Take the study's small twin.
        only: Conditions on settings, `setting=value` or `setting=value,value`: the models that meet them all.
        at_most: More models are refused, as a slip in an axis; None: any number.

    Raises:
        RequestError: The study cannot be used.
    """
    return make_plan(read_study(study, overrides, small=small, only=only, at_most=at_most), models_per_trial)


def program_key(model: Model, arguments: Mapping[str, Argument]) -> tuple[Any, ...]:
    """Return what all models of one stack agree in."""
    return tuple(
        (name, value)
        for name, value in model.settings.items()
        if name not in arguments or not arguments[name].setting.per_model
    )


def _even_parts(models: Sequence[Model], largest: int) -> Iterable[Sequence[Model]]:
    parts = math.ceil(len(models) / largest)
    bounds = [round(part * len(models) / parts) for part in range(parts + 1)]
    return [models[start:stop] for start, stop in pairwise(bounds)]


@dataclass(frozen=True)
class Missing:
    """What of a plan is still to be done.

    Attributes:
        train: Trials to train, their members the models that are not there.
        measure: Trials of trained models to measure from saved weights, with the labels they lack.
    """

    train: tuple[Trial, ...]
    measure: tuple[Trial, ...]


def missing(plan: Plan, models: Iterable[tuple[str, str, str]], measured: Iterable[tuple[str, str]]) -> Missing:
    """Return what of a plan is not in the results.

    Args:
        plan: The plan.
        models: `model_id`, `trial_id` and `status` of the trained models.
        measured: The (model_id, label) pairs that have been computed.
    """
    rows = {model_id: (trial_id, status) for model_id, trial_id, status in models}
    train, measure = missing_of(plan.trials, rows, set(measured))
    return Missing(tuple(train), tuple(measure))
