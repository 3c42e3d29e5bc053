"""A trial: what crosses from the plan to a worker."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from flatmin.errors import RequestError
from flatmin.settings import digest


@dataclass(frozen=True, slots=True)
class Model:
    """One network to be trained once.

    Attributes:
        model_id: 16 hex digits of a hash of the settings.
        settings: Canonical settings by name, `dataset`, `network` and `optimizer` among them.
    """

    model_id: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """K models of one program, trained together and committed together.

    Attributes:
        study: The study's name.
        models: The members of the stack, in stack order.
        measures: Canonical measure labels to compute of every member.
        measure_every: Epochs between measures of models under way; None: at the end alone.
        committed_as: For models that are trained already: the trial that holds their weights and rows.
    """

    study: str
    models: tuple[Model, ...]
    measures: tuple[str, ...] = ()
    committed_as: str | None = None
    measure_every: int | None = None

    @property
    def trial_id(self) -> str:
        """16 hex digits of a hash of the members' ids, whatever their order."""
        return self.committed_as or digest(sorted(model.model_id for model in self.models))

    @property
    def program(self) -> Mapping[str, Any]:
        """The first member's settings; those that are not `per_model` hold for every member."""
        return self.models[0].settings


def missing_of(
    trials: Iterable[Trial], rows: Mapping[str, tuple[str, str]], measured: Collection[tuple[str, str]]
) -> tuple[list[Trial], list[Trial]]:
    """Return what of some trials is still to be trained, and what of trained models is still to be measured.

    Args:
        trials: The trials, none of them of saved weights.
        rows: The `trial_id` and `status` of trained models, by model_id.
        measured: The (model_id, label) pairs that have been computed.
    """
    train: list[Trial] = []
    lacking: dict[tuple[str, str, tuple[str, ...]], list[Model]] = {}
    for trial in trials:
        left = tuple(model for model in trial.models if model.model_id not in rows)
        if left:
            train.append(trial if len(left) == len(trial.models) else replace(trial, models=left))
        for model in trial.models:
            trial_id, status = rows.get(model.model_id, ("", "diverged"))
            if status == "diverged":
                continue
            labels = tuple(label for label in trial.measures if (model.model_id, label) not in measured)
            if labels:
                lacking.setdefault((trial.study, trial_id, labels), []).append(model)
    measure = [
        Trial(study, tuple(models), labels, committed_as=trial_id)
        for (study, trial_id, labels), models in lacking.items()
    ]
    return train, measure


@dataclass(frozen=True)
class Execution:
    """How a trial is run; recorded in `models.execution`, never part of an id.

    Attributes:
        device: `cpu` or `cuda`.
        threads: Threads of one trial on the CPU.
        checkpoint_seconds: Time between two checkpoints of a trial under way.
        vectorize: `auto`, `vmap` or `loop` (see `flatmin.stack.StackedNetwork`).
        compile: Whether the training pass is compiled (torch.compile).
        cuda_graphs: Whether the training pass is launched as one CUDA graph.
        channels_last: Whether images lie in memory channels last.
        micro_batch: The most examples of each model in one pass; None: a whole batch, `auto`: as many as fit.
        processes_per_model: Processes that train a model together, each on a GPU of its own where there are any.
        weights: Whether the trained weights are kept.
    """

    device: str = "cpu"
    threads: int = 1
    checkpoint_seconds: float = 300.0
    vectorize: Literal["auto", "vmap", "loop"] = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    channels_last: bool = False
    micro_batch: int | Literal["auto"] | None = None
    processes_per_model: int = 1
    weights: bool = True

    def check_device(self) -> None:
        """Refuse what the device cannot do.

        Raises:
            RequestError: CUDA graphs were asked for, without CUDA.
        """
        if self.cuda_graphs and self.device != "cuda":
            raise RequestError("--cuda-graphs: the trials run on a CPU, which has none; leave it out")


@dataclass(frozen=True, slots=True)
class Job:
    """A trial with where its rows go and how it is run.

    Attributes:
        trial: The models to train, or, when they are committed already, to measure from their saved weights.
        results: The results directory.
        token: The lease under which the worker may commit.
        execution: How to run it.
        apart_after: Failed attempts after which a stack is halved until the models that fail stand alone.
    """

    trial: Trial
    results: str
    token: str
    execution: Execution = Execution()
    apart_after: int = 1
