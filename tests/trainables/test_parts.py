"""A trial in parts: what a plug-in does to one model is that model's alone."""

from __future__ import annotations

import sys
from collections.abc import Generator

import pytest

from flatmin.errors import FlatminError, ModelsFailed
from flatmin.trainables.parts import Attempt, Part
from flatmin.trial import Model, Trial


def exits(part: Part) -> Generator[int]:
    """Work in which the plug-in of model `b` ends the process."""
    if any(model.model_id == "b" for model in part.trial.models):
        sys.exit(0)
    yield len(part.trial.models)


def trial(*names: str) -> Trial:
    return Trial("s", tuple(Model(name, {}) for name in names))


def test_a_plug_in_that_would_end_the_process_fails() -> None:
    with pytest.raises(FlatminError, match=r"a plug-in has called sys\.exit"):
        list(Attempt(exits, lambda part: False, apart=False).run(trial("a", "b")))


def test_it_costs_no_other_model() -> None:
    attempt = Attempt(exits, lambda part: False, apart=True)
    with pytest.raises(ModelsFailed) as failed:
        list(attempt.run(trial("a", "b", "c", "d")))
    assert set(failed.value.of_model) == {"b"}
    assert attempt.succeeded
