"""A calibrated estimate: pilots of every kind of trial on this machine, as many at a time as a launch would run.

A kind is the trials of one program: one network, data set, batch size, optimizer. Of each kind one stack is
trained for a share of the budget (see `flatmin.trainables.pilot`); where that is too short for all kinds, a spread
of them from the cheapest to the dearest. The others take what their counts of operations say, times what the nearest
kind took over what its counts said.

A model ends when those of its kind do that differ from it in the fewest settings, seeds aside (see
`flatmin.orchestrator.endings`). The interval goes from the earliest ends to the latest, times a margin for the speed,
which grows from kinds that were seen to their ends to kinds that were not looked at. It is a judgement, no statistic.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flatmin.errors import FlatminError, RequestError
from flatmin.orchestrator.endings import Curve, Ending, ending
from flatmin.orchestrator.estimate import Estimate, cpus, trial_bytes, trial_costs
from flatmin.orchestrator.grid import SEEDS
from flatmin.orchestrator.plan import program_key
from flatmin.orchestrator.rates import Line, Rates, makespan, predicted_rates, trial_passes, trial_seconds
from flatmin.orchestrator.study_file import Resources
from flatmin.settings import Argument
from flatmin.trial import Execution, Model, Trial

if TYPE_CHECKING:
    from flatmin.trainables.pilot import Pilot

SHORTEST = 2.0
"""Seconds below which a pilot says nothing."""

START_SECONDS = 10.0
"""From the start of a launch to its first trial, and from its last to its end: Ray, and loading torch."""

SEEN, BEGUN, UNSEEN = 1.2, 1.4, 2.0
"""Margin of the speed of a kind that was trained to its end, that was begun, that was not looked at."""


@dataclass
class Kind:
    """Trials of one program, and what is known of them."""

    trials: list[Trial]
    cost: Mapping[str, Any]
    per_model: frozenset[str]
    found: Pilot | None = None
    curves: list[Curve] = field(default_factory=list)

    @property
    def predicted(self) -> Rates:
        """What counts of operations say."""
        return predicted_rates(self.trials[0], self.cost)

    def key(self, model: Model) -> tuple[Any, ...]:
        """Return what tells a model from others of its kind, seeds aside."""
        return tuple((name, model.settings[name]) for name in sorted(self.per_model))

    def pilot_trial(self) -> Trial:
        """Return a trial of as many models as the largest stack has, as different from each other as can be."""
        models = [model for trial in self.trials for model in trial.models]
        seen: dict[tuple[Any, ...], int] = {}
        ranked = []
        for model in models:
            rank = seen[self.key(model)] = seen.get(self.key(model), -1) + 1
            ranked.append((rank, model.model_id, model))
        size = max(len(trial.models) for trial in self.trials)
        chosen = [model for _, _, model in sorted(ranked, key=lambda item: item[:2])[:size]]
        first = self.trials[0]
        return Trial(first.study, tuple(chosen), first.measures, measure_every=first.measure_every)

    def take(self, found: Pilot) -> None:
        """Note what a pilot has found."""
        self.found = found
        self.curves = [Curve(seen.epochs, seen.losses, seen.ended) for seen in found.seen]

    def endings(self, elsewhere: Sequence[Curve]) -> dict[tuple[Any, ...], list[Ending]]:
        """Return when the models of the pilot end, likened to each other, or to models elsewhere where none ended."""
        found: dict[tuple[Any, ...], list[Ending]] = {}
        for model, curve in zip(self.pilot_trial().models, self.curves, strict=False):
            stop, epochs = model.settings["stop_loss"], model.settings["epochs"]
            own = ending(curve, stop, epochs, [other for other in self.curves if other.ended] or elsewhere)
            found.setdefault(self.key(model), []).append(own)
        return found


def calibrate(
    trials: Sequence[Trial],
    arguments: Mapping[str, Argument],
    resources: Resources,
    *,
    budget: float = 60.0,
    concurrency: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Estimate:
    """Estimate what trials cost from pilots on this machine.

    Args:
        trials: The trials.
        arguments: The declaration of every setting of their models.
        resources: What each of them is given.
        budget: Seconds that pilots may take, by the clock; starting their processes comes on top.
        concurrency: Trials at a time; as many as this machine holds when None.
        progress: Told how many pilots have ended, and of how many.

    Raises:
        RequestError: A trial cannot be trained, or this machine has not what it needs.
        FlatminError: The data are not here.
    """
    if budget < SHORTEST:
        raise RequestError(f"--calibrate-budget {budget:g}s: pilots of less than {SHORTEST:g} s say nothing")
    costs = trial_costs(trials)
    lacking = next((cost for cost in costs if "error" in cost or cost["assumed"]), None)
    if lacking is not None:
        why = lacking.get("error") or lacking["assumed"].rpartition(";")[0]
        raise RequestError(f"--calibrate trains on the data, and {why}; leave --calibrate out, or get the data first")
    kinds = kinds_of(trials, costs, arguments)
    room, gpus = capacity(resources)
    at_once = min(room, concurrency or room)
    execution = Execution(device="cuda" if gpus else "cpu", threads=max(1, int(resources.cpus_per_trial)))
    chosen = spread(list(kinds.values()), int(budget * at_once / SHORTEST))
    run_pilots(chosen, execution, budget, at_once, gpus, progress)
    return summed(trials, costs, [kinds[program_key(t.models[0], arguments)] for t in trials], concurrency or room)


def kinds_of(
    trials: Sequence[Trial], costs: Sequence[Mapping[str, Any]], arguments: Mapping[str, Argument]
) -> dict[tuple[Any, ...], Kind]:
    """Return the kinds of trials by what their models agree in."""
    kinds: dict[tuple[Any, ...], Kind] = {}
    for trial, cost in zip(trials, costs, strict=True):
        own = {name for name in trial.program if name in arguments and arguments[name].setting.per_model}
        kind = Kind([], cost, frozenset(own - {"seed", *SEEDS}))
        kinds.setdefault(program_key(trial.models[0], arguments), kind).trials.append(trial)
    return kinds


def capacity(resources: Resources) -> tuple[int, int]:
    """Return how many trials this machine runs at a time, and on how many GPUs.

    Raises:
        RequestError: It has not enough for one.
    """
    cores, gpus = cpus(), 0
    if resources.gpus_per_trial != 0 and shutil.which("nvidia-smi"):
        with _pool(1, 0) as pool:
            gpus = pool.submit(_gpus).result()
    share = 1.0 if resources.gpus_per_trial == "auto" else resources.gpus_per_trial
    room = int(min(cores / resources.cpus_per_trial, gpus / share if gpus else math.inf))
    if room < 1:
        raise RequestError(
            f"--calibrate: a trial needs {resources.cpus_per_trial:g} CPUs and {share if gpus else 0:g} GPUs, and this "
            f"machine has {cores} and {gpus}; calibrate where the study will run, or leave --calibrate out"
        )
    return room, gpus


def spread(kinds: Sequence[Kind], most: int) -> list[Kind]:
    """Return at most so many kinds, the cheapest trial first, evenly from the cheapest to the dearest."""
    ranked = sorted(kinds, key=lambda kind: trial_seconds(kind.trials[0], kind.cost, kind.predicted, _all(kind)))
    if len(ranked) <= max(1, most):
        return ranked
    places = [round(place * (len(ranked) - 1) / max(1, most - 1)) for place in range(max(1, most))]
    return [ranked[place] for place in dict.fromkeys(places)]


def _all(kind: Kind) -> list[float]:
    return [model.settings["epochs"] for model in kind.trials[0].models]


def run_pilots(
    kinds: Sequence[Kind],
    execution: Execution,
    budget: float,
    at_once: int,
    gpus: int,
    progress: Callable[[int, int], None],
) -> None:
    """Run a pilot of each kind; what one leaves of its share of the budget goes to those that come after it."""
    waiting = list(kinds)
    running: dict[Future[Pilot], tuple[Kind, float]] = {}
    left = budget * at_once
    with _pool(at_once, gpus) as pool:
        while waiting or running:
            while waiting and len(running) < at_once:
                share = max(SHORTEST, left / len(waiting))
                left -= share
                kind = waiting.pop(0)
                passes = trial_passes(kind.trials[0], kind.cost)
                running[pool.submit(_pilot, kind.pilot_trial(), execution, share, passes)] = kind, share
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                kind, share = running.pop(future)
                found = future.result()
                kind.take(found)
                left += share - found.spent
                progress(len(kinds) - len(waiting) - len(running), len(kinds))


@contextmanager
def _pool(workers: int, gpus: int) -> Iterator[ProcessPoolExecutor]:
    """Run fresh processes, each on a GPU of its own while there are enough.

    Raises:
        FlatminError: One of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _claim, (context.Value("i", 0), gpus))
    try:
        yield pool
    except BrokenProcessPool:
        raise FlatminError(
            "--calibrate: a process that trained was killed, for want of memory as a rule; give a smaller "
            "--concurrency or --models-per-trial"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _claim(counter: Any, gpus: int) -> None:
    if gpus:
        with counter.get_lock():
            place = counter.value
            counter.value += 1
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = (visible if visible != [""] else list(map(str, range(gpus))))[place % gpus]


def _gpus() -> int:
    from flatmin.trainables.pilot import devices

    return devices()


def _pilot(trial: Trial, execution: Execution, seconds: float, passes: float) -> Pilot:
    from flatmin.trainables.pilot import pilot

    return pilot(trial, execution, seconds, passes)


def summed(
    trials: Sequence[Trial], costs: Sequence[Mapping[str, Any]], kinds: Sequence[Kind], concurrency: int
) -> Estimate:
    """Put what pilots have found together to what trials cost.

    Args:
        trials: The trials.
        costs: What the program of each costs.
        kinds: The kind of each.
        concurrency: Trials at a time.
    """
    distinct = {id(kind): kind for kind in kinds}
    piloted = [kind for kind in distinct.values() if kind.found is not None]
    ended = [curve for kind in piloted for curve in kind.curves if curve.ended]
    endings = {id(kind): kind.endings(ended) for kind in piloted}
    known = {place: _Known.of(kind, piloted, endings) for place, kind in distinct.items()}
    ranges = [known[id(kind)].range_of(trial) for trial, kind in zip(trials, kinds, strict=True)]
    walls = [expected + known[id(kind)].rates.setup for (_, expected, _), kind in zip(ranges, kinds, strict=True)]
    complete = sum(kind.found is not None and kind.found.complete for kind in piloted)
    return Estimate(
        tuple(expected for _, expected, _ in ranges),
        sum(trial_bytes(trial, cost) for trial, cost in zip(trials, costs, strict=True)),
        START_SECONDS + makespan(walls, concurrency),
        concurrency,
        f"from pilots of {len(piloted)} of {len(distinct)} kinds of trial, {complete} of which came to their end; "
        "models of others may end at any epoch",
        low=sum(low for low, _, _ in ranges),
        high=sum(high for _, _, high in ranges),
    )


@dataclass
class _Known:
    """What is known of a kind: how long its parts take, when models end, how far the speed may be off."""

    kind: Kind
    rates: Rates
    endings: Mapping[tuple[Any, ...], Sequence[Ending]]
    margin: float
    _ends: dict[tuple[Any, ...], tuple[float, float, float]] = field(default_factory=dict)

    @staticmethod
    def of(kind: Kind, piloted: Sequence[Kind], endings: Mapping[int, dict[tuple[Any, ...], list[Ending]]]) -> _Known:
        """Return what its own pilot has found, or that of the nearest kind, by their counts of operations."""
        source = kind if kind.found is not None else min(piloted, key=lambda other: _distance(kind, other))
        found = source.found
        assert found is not None
        step, evaluation = Line(*found.step), Line(*found.evaluation)
        if source is kind:
            rates = Rates(step, evaluation, found.measures, found.setup)
            return _Known(kind, rates, endings[id(kind)], SEEN if found.complete else BEGUN)
        size = len(kind.trials[0].models)
        said, own = source.predicted, kind.predicted
        rates = Rates(
            own.step.scaled(step.of(size) / said.step.of(size)),
            own.evaluation.scaled(evaluation.of(size) / said.evaluation.of(size)),
            found.measures * own.measures / said.measures if said.measures else own.measures,
            found.setup,
        )
        return _Known(kind, rates, endings[id(source)], UNSEEN)

    def range_of(self, trial: Trial) -> tuple[float, float, float]:
        """Return the seconds of a trial: at least, expected, at most."""
        ends = [self._end(model) for model in trial.models]
        low, expected, high = (
            trial_seconds(trial, self.kind.cost, self.rates, [end[place] for end in ends]) for place in range(3)
        )
        return low / self.margin, expected, high * self.margin

    def _end(self, model: Model) -> tuple[float, float, float]:
        key = self.kind.key(model)
        if key not in self._ends:
            self._ends[key] = self._nearest(model, key)
        return self._ends[key]

    def _nearest(self, model: Model, key: tuple[Any, ...]) -> tuple[float, float, float]:
        epochs = float(model.settings["epochs"])
        alike = self.endings.get(key)
        if alike is None and model.settings["stop_loss"] > 0:
            wanted = set(key)
            differing = {other: len(wanted.symmetric_difference(other)) for other in self.endings}
            fewest = min(differing.values())
            alike = [ending for other, found in self.endings.items() if differing[other] == fewest for ending in found]
        if alike is None:
            return epochs, epochs, epochs
        bounds = (
            min(ending.low for ending in alike),
            sum(ending.expected for ending in alike) / len(alike),
            max(ending.high for ending in alike),
        )
        low, expected, high = (min(epochs, bound) for bound in bounds)
        return low, expected, high


def _distance(kind: Kind, other: Kind) -> tuple[int, float]:
    """Return how far two kinds are from each other: names that differ, then the ratio of what their steps take."""
    ours, theirs = kind.trials[0].program, other.trials[0].program
    differing = sum(ours[name] != theirs[name] for name in ("dataset", "network", "optimizer"))
    return differing, abs(math.log(kind.predicted.step.of(1) / other.predicted.step.of(1)))
