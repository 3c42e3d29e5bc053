"""The plan: who may share a stack, and what of a plan is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flatmin.orchestrator.plan import make_plan, missing
from flatmin.orchestrator.study import read_study

Write = Callable[..., Path]


def test_stacks_hold_models_that_differ_only_per_model(write_study: Write) -> None:
    study = read_study(
        str(write_study()),
        ["lr=0.1,0.01", "label_noise=0,0.2", "batch_size=100,250", "momentum=0,0.9", "epochs=2,3"],
    )
    plan = make_plan(study)
    assert sorted(len(trial.models) for trial in plan.trials) == [32, 32, 32, 32]
    for trial in plan.trials:
        assert len({(m.settings["width"], m.settings["batch_size"]) for m in trial.models}) == 1
    assert sorted(m.model_id for m in plan.models) == sorted(m.model_id for m in study.models)


def test_large_groups_are_cut_evenly(write_study: Write) -> None:
    study = read_study(str(write_study()), ["width=2", "seeds=100"])
    assert [len(trial.models) for trial in make_plan(study).trials] == [33, 34, 33]
    assert [len(trial.models) for trial in make_plan(study, 10).trials] == [10] * 10
    assert [len(trial.models) for trial in make_plan(study, 1).trials] == [1] * 100


def test_the_studys_own_stack_size_is_the_default(write_study: Write) -> None:
    text = write_study().read_text() + "resources: {models_per_trial: 1}\n"
    study = read_study(str(write_study(text)))
    assert len(make_plan(study).trials) == 4
    assert len(make_plan(study, "auto").trials) == 2


def test_trial_id_is_a_function_of_the_members_alone(write_study: Write) -> None:
    file = str(write_study())
    whole = {trial.trial_id for trial in make_plan(read_study(file)).trials}
    reordered = {trial.trial_id for trial in make_plan(read_study(file, ["width=4,2", "seeds=1,0"])).trials}
    one = {trial.trial_id for trial in make_plan(read_study(file, ["width=4"])).trials}
    assert whole == reordered
    assert one < whole


def test_measures_are_not_part_of_any_id(write_study: Write) -> None:
    file = str(write_study())
    plain, measured = make_plan(read_study(file)), make_plan(read_study(file, ["measures=lpf,lambda_max"]))
    assert [t.trial_id for t in plain.trials] == [t.trial_id for t in measured.trials]
    assert measured.trials[0].measures == ("lpf", "lambda_max")


def test_missing_trains_only_what_is_not_there_and_measures_what_is(write_study: Write) -> None:
    plan = make_plan(read_study(str(write_study()), ["measures=lpf,lambda_max"]))
    first, second = plan.trials
    rows = [
        (model.model_id, "t0", status) for model, status in zip(first.models, ("finished", "diverged"), strict=True)
    ]
    measured = [(first.models[0].model_id, "lpf")]
    left = missing(plan, rows, measured)
    assert left.train == (second,)
    (again,) = left.measure
    assert again.models == first.models[:1], "a diverged model has no minimum to measure"
    assert again.measures == ("lambda_max",)
    assert again.trial_id == "t0", "rows and weights stay under the trial that trained the model"


def test_a_grid_that_grew_trains_the_new_models_alone(write_study: Write) -> None:
    file = str(write_study())
    small, large = make_plan(read_study(file)), make_plan(read_study(file, ["seeds=3"]))
    rows = [(model.model_id, trial.trial_id, "finished") for trial in small.trials for model in trial.models]
    left = missing(large, rows, [])
    assert [[m.settings["seed"] for m in trial.models] for trial in left.train] == [[2], [2]]
    assert not left.measure
