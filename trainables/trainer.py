"""Training a stack: K models of one program, step by step, each with its own settings and its own end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.optimizers.compose import StackOptimizer
from flatmin.optimizers.interface import Rule, Step, answered
from flatmin.plugins import get
from flatmin.stack import StackedNetwork, Streams, permutation, stream_key
from flatmin.stack.network import Buffers
from flatmin.trainables.data import Split, StackData, stack_data
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.evaluation import Scores, evaluate
from flatmin.trainables.forward import Forward
from flatmin.trainables.passes import MicroBatch, Passes
from flatmin.trainables.progress import Outcome, Progress
from flatmin.trainables.ranks import Ranks
from flatmin.trainables.tasks import check_recipes, objective
from flatmin.trainables.training import Recipe
from flatmin.trial import Execution, Trial

DTYPES = {"fp64": torch.float64}
"""The type of the weights, by precision; fp32 where it is not named."""


class StackTrainer:
    """Trains the models of a trial together.

    Args:
        trial: The models; they share all settings that are not `per_model`.
        dataset: Their data set.
        build: Builds the network; called under each model's own initial seed.
        execution: Device, threads and how the stack is vectorised.
        ranks: The processes that train it together, of which this is one; this one alone by default.

    Raises:
        RequestError: The data, the settings and the execution do not go together.
    """

    def __init__(
        self,
        trial: Trial,
        dataset: Dataset,
        build: Callable[[], nn.Module],
        execution: Execution,
        ranks: Ranks | None = None,
    ) -> None:
        self.trial, self.ranks = trial, ranks or Ranks()
        self.device = torch.device(execution.device)
        names = get("training", "training").arguments
        entry = get("training", "training").load()
        self.recipes: list[Recipe] = [entry(**{name: model.settings[name] for name in names}) for model in trial.models]
        check_together(trial, execution)
        check_recipes(dataset.task, self.recipes)
        precision = self.recipes[0].precision
        dtype = DTYPES.get(precision, torch.float32)
        self.network, params, buffers = initial_stack(build, self.recipes, dtype, self.device, execution)
        self.objective = objective(dataset, self.device)
        self.forward = Forward(self.network, self.objective, precision, execution, self.ranks)
        self.micro_batch = MicroBatch.of(execution, self.network)
        self.data = stack_data(dataset, self.recipes, self.device, dtype)
        own = [model.settings for model in trial.models]
        self.optimizer = StackOptimizer(str(trial.program["optimizer"]), own, params)
        rule = self.optimizer.composed.rule
        check_split(rule, self.recipes[0].batch_size)
        self.step_size = self.recipes[0].batch_size * (1 if rule.splits else rule.batches)
        """Examples that a step takes of each model's training set."""
        self.of_examples: dict[tuple[Any, ...], dict[Any, Any]] = {}  # what measures have made of some models' examples
        self.outcomes = [Outcome() for _ in trial.models]
        self.progress = Progress(
            alive=list(range(len(trial.models))),
            params=params,
            buffers=buffers,
            optimizer=dict(self.optimizer.composed.init(params)),
            params_before=params,
            buffers_before=buffers,
            running=torch.ones(len(params), dtype=torch.bool, device=self.device),
        )
        self._narrow()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the training set; the last one may be short."""
        return math.ceil(len(self.data.train) / self.step_size)

    def restore(self, progress: Progress, outcomes: list[Outcome]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It is of another optimizer.
        """
        if set(progress.optimizer) != set(self.progress.optimizer):
            raise ValueError("the checkpoint holds the state of another optimizer")
        self.progress, self.outcomes = progress.to(self.device), outcomes
        self._narrow()

    def train(self) -> Iterator[Progress]:
        """Train to the end, yielding after every step; a checkpoint may be taken at any yield."""
        while self.progress.alive:
            started = time.perf_counter()
            orders = torch.split(self._orders(), self.step_size, 1)
            left = orders[self.progress.step :]
            splits = self._data.train.steps(self.progress.epoch, [self._own(order) for order in left])
            for order, split in zip(left, splits, strict=True):
                self._step(order, split)
                self.progress.step += 1
                started = self._account(started)
                if self.progress.step < len(orders):
                    yield self.progress
                    started = time.perf_counter()
            self._end_epoch()
            self._account(started)
            yield self.progress

    def _account(self, since: float) -> float:
        moment = time.perf_counter()
        self.progress.seconds += (moment - since) / max(1, len(self.progress.alive))
        return moment

    def _narrow(self) -> None:
        """Fit everything that is not in the progress to the models still alive."""
        index = torch.tensor(self.progress.alive, dtype=torch.int64)
        self._recipes = [self.recipes[position] for position in self.progress.alive]
        self._data: StackData = self.data.select(index.to(self.device))
        self._optimizer = self.optimizer.select(index.to(self.device))
        shares = [recipe.label_smoothing for recipe in self._recipes]
        smoothing = torch.tensor(shares, dtype=self.progress.params.dtype, device=self.device)
        self._smoothing = smoothing if any(shares) else None
        self._limits = [recipe.max_loss for recipe in self._recipes]
        self._max_loss = torch.tensor(self._limits, dtype=torch.float64, device=self.device)
        keys = [stream_key("training", recipe.order_seed) for recipe in self._recipes]
        self._keys = torch.tensor(keys, dtype=torch.int64, device=self.device)
        keys = [stream_key("optimizer", recipe.order_seed) for recipe in self._recipes]
        self._optimizer_keys = torch.tensor(keys, dtype=torch.int64, device=self.device)
        total = [recipe.epochs * self.steps_per_epoch for recipe in self._recipes]
        self._total = torch.tensor(total, dtype=self.progress.params.dtype, device=self.device)[:, None]

    def _orders(self) -> Tensor:
        """Return each model's order of the training examples in this epoch, `[K, n]`."""
        seeds = [recipe.order_seed for recipe in self._recipes]
        n = len(self._data.train)
        if not self.recipes[0].shuffle:
            return torch.arange(n, device=self.device).repeat(len(seeds), 1)
        of_seed = {
            seed: permutation(stream_key("order", seed, self.progress.epoch), n) for seed in dict.fromkeys(seeds)
        }
        return torch.stack([of_seed[seed] for seed in seeds]).to(self.device)

    def _batches(self, order: Tensor) -> list[Tensor]:
        """Return the batches of a step over examples `[K, s]`."""
        rule, size = self.optimizer.composed.rule, self.recipes[0].batch_size
        if not rule.splits:
            return [order] if order.shape[1] <= size else list(torch.split(order, size, 1))
        # a short last batch has fewer micro-batches rather than smaller ones, which BatchNorm could not take
        return list(order.tensor_split(max(1, order.shape[1] * rule.batches // size), 1))

    def _own(self, order: Tensor) -> Tensor:
        """Return the examples of a step that this process passes through the network."""
        if self.ranks.size == 1:
            return order
        batches = self._batches(order)
        bounds = [self.ranks.share(batch.shape[1]) for batch in batches]
        return torch.cat([batch[:, start:stop] for batch, (start, stop) in zip(batches, bounds, strict=True)], 1)

    def _step(self, order: Tensor, split: Split) -> None:
        now, examples, batches = self.progress, len(self._data.train), self._batches(order)
        first = now.epoch * examples + now.step * self.optimizer.composed.rule.batches
        passes = Passes(
            self.forward,
            split,
            batches,
            now.buffers,
            self.recipes[0].bn_updates,
            lambda batch: Streams(self._keys, first + batch),
            self._smoothing,
            self.micro_batch,
        )
        count, factors = now.epoch * self.steps_per_epoch + now.step, self._lr_factors(now.step)
        step = Step(
            count=count,
            total=self._total,
            lr_factor=now.params.new_tensor(factors)[:, None] if any(factor != 1.0 for factor in factors) else 1.0,
            batches=len(batches),
            hessian=self._optimizer.composed.needs_hessian(count),
            streams=Streams(self._optimizer_keys, count),
            shapes=self.network.shapes,
            dtype=now.params.dtype,
        )
        stepping = self._optimizer.composed.steps(now.params, now.optimizer, step)
        losses, params, state = answered(stepping, passes.answer)
        updated, before = passes.buffers, (now.params, now.buffers)
        if self._all_go_on(losses, params):
            now.params, now.buffers, now.optimizer = params, updated, dict(state)
        else:
            fits = losses <= self._max_loss  # false for NaN as well
            keep = now.running & fits & torch.isfinite(params).all(dim=1)
            back = now.running & ~fits
            now.params = _where(keep, params, _where(back, now.params_before, now.params))
            now.buffers = {
                name: _where(keep, updated[name], _where(back, now.buffers_before[name], buffer))
                for name, buffer in now.buffers.items()
            }
            now.optimizer = {name: _where(keep, state[name], old) for name, old in now.optimizer.items()}
            now.running = keep
        now.params_before, now.buffers_before = before

    def _all_go_on(self, losses: Tensor, params: Tensor) -> bool:
        """Return whether surely no model has diverged (a finite sum has finite terms); to ask a GPU is to wait."""
        return (
            params.is_cpu
            and all(self.progress.running.tolist())
            and all(loss <= limit for loss, limit in zip(losses.tolist(), self._limits, strict=True))
            and all(map(math.isfinite, params.sum(dim=1).tolist()))
        )

    def _lr_factors(self, step: int) -> list[float]:
        """Return what each model's learning rate is multiplied by in a step of this epoch."""
        epoch, steps = self.progress.epoch, self.steps_per_epoch
        return [recipe.lr_factor(epoch, step, steps) for recipe in self._recipes]

    def _end_epoch(self) -> None:
        now = self.progress
        lr_factors = self._lr_factors(now.step - 1)
        now.epoch, now.step = now.epoch + 1, 0
        running = now.running.tolist()
        due = [not runs or recipe.evaluates(now.epoch) for runs, recipe in zip(running, self._recipes, strict=True)]
        stopping = any(recipe.stop_loss > 0 for recipe in self._recipes)
        if not any(due) and not stopping:
            return
        train = self._evaluate(self._data.train)
        lost = now.running.cpu() & ~(train.loss <= self._max_loss.cpu())
        if bool(lost.any()):  # the last step led out of bounds, and no batch has seen it
            self._step_back(lost.to(self.device))
            train = self._evaluate(self._data.train)
            running = now.running.tolist()
            due = [a or b for a, b in zip(due, lost.tolist(), strict=True)]
        reached = [
            recipe.stop_loss > 0 and loss <= recipe.stop_loss
            for recipe, loss in zip(self._recipes, train.loss.tolist(), strict=True)
        ]
        due = [a or b for a, b in zip(due, reached, strict=True)]
        if not any(due):
            return
        val = self._evaluate(self._data.val) if self._data.val else None
        scores = {"train": train, "val": val, "test": self._evaluate(self._data.test)}
        left = []
        for row, position in enumerate(now.alive):
            recipe = self._recipes[row]
            if due[row]:
                base = self.trial.models[position].settings.get("lr")
                lr = None if base is None else float(base) * lr_factors[row]
                self.outcomes[position].epochs.append(self._epoch_row(scores, row, lr))
            status = "diverged" if not running[row] else "converged" if reached[row] else "finished"
            if not running[row] or reached[row] or now.epoch >= recipe.epochs:
                self._finish(row, position, status, train)
            else:
                left.append(row)
        if len(left) < len(now.alive):
            self.progress = now.select(torch.tensor(left, dtype=torch.int64, device=self.device))
            self._narrow()

    def _step_back(self, rows: Tensor) -> None:
        """Give some models, bool `[K]`, the weights from before the last step, and end their training."""
        now = self.progress
        now.params = _where(rows, now.params_before, now.params)
        now.buffers = {name: _where(rows, now.buffers_before[name], buffer) for name, buffer in now.buffers.items()}
        now.running = now.running & ~rows

    def _evaluate(self, split: Split) -> Scores:
        now = self.progress
        return evaluate(self.network, now.params, now.buffers, split, self.objective, self.ranks)

    def _epoch_row(self, scores: Mapping[str, Scores | None], row: int, lr: float | None) -> dict[str, Any]:
        columns: dict[str, Any] = {"epoch": self.progress.epoch}
        for part, score in scores.items():
            for name in ("loss", "acc", "dice"):
                values = getattr(score, name, None)
                columns[f"{part}_{name}"] = None if values is None else float(values[row])
        return {**columns, "lr": lr, "seconds": self.progress.seconds}

    def _finish(self, row: int, position: int, status: str, train: Scores) -> None:
        now, outcome = self.progress, self.outcomes[position]
        last = outcome.epochs[-1]
        gap = None if last["train_acc"] is None else last["train_acc"] - last["test_acc"]
        best = (
            min(outcome.epochs, key=lambda epoch: float(epoch["test_loss"]))
            if gap is None
            else max(outcome.epochs, key=lambda epoch: float(epoch["test_acc"]))
        )
        outcome.row = {
            "status": status,
            "epochs_run": now.epoch,
            "n_params": self.network.n_params,
            **{name: last[name] for name in last if name not in {"epoch", "lr", "seconds"}},
            "train_acc_clean": None if train.acc_clean is None else float(train.acc_clean[row]),
            "best_test_acc": best["test_acc"],
            "best_test_epoch": best["epoch"],
            "gen_gap": gap,
            "loss_gap": last["test_loss"] - last["train_loss"],
            "label_flip_rate": float(self._data.label_flip_rate[row]) if self.objective.has_labels else None,
            "seconds": now.seconds,
        }
        outcome.params = now.params[row].detach().cpu().clone()
        outcome.buffers = {name: buffer[row].cpu().clone() for name, buffer in now.buffers.items()}


def check_together(trial: Trial, execution: Execution) -> None:
    """Check that several processes can train a trial.

    Raises:
        RequestError: There are several models, or execution options that only one process can have.
    """
    size = execution.processes_per_model
    if size == 1:
        return
    if len(trial.models) > 1:
        raise RequestError(
            f"--processes-per-model {size} trains one model at a time, and this trial has {len(trial.models)}; "
            "give --models-per-trial 1"
        )
    asked = {
        "--micro-batch auto": execution.micro_batch == "auto",
        "--compile": execution.compile,
        "--cuda-graphs": execution.cuda_graphs,
    }
    for option in (option for option, given in asked.items() if given):
        raise RequestError(f"{option} does not go with --processes-per-model {size}; leave one of the two out")


def check_split(rule: Rule, batch_size: int) -> None:
    """Check that a batch can be split as a rule wants it.

    Raises:
        RequestError: It has fewer examples than the rule has micro-batches.
    """
    if rule.splits and rule.batches > batch_size:
        raise RequestError(f"batch_size = {batch_size} cannot be split into {rule.batches} micro-batches")


def initial_stack(
    build: Callable[[], nn.Module],
    recipes: Sequence[Recipe],
    dtype: torch.dtype,
    device: torch.device,
    execution: Execution,
) -> tuple[StackedNetwork, Tensor, dict[str, Tensor]]:
    """Build every model under its own seed; return the network, weights `[K, d]` and stacked buffers.

    The global generator is left as it was.
    """
    modules: dict[int, nn.Module] = {}
    for recipe in recipes:
        if recipe.init_seed not in modules:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stream_key("init", recipe.init_seed))
                modules[recipe.init_seed] = build()
    params, buffers = StackedNetwork.stack([modules[recipe.init_seed] for recipe in recipes])
    together = execution.processes_per_model == 1
    network = StackedNetwork(
        next(iter(modules.values())),
        execution.vectorize if together else "loop",  # what processes share is exchanged in plain calls
        channels_last=execution.channels_last,
    )
    network.template.to(device=device, dtype=dtype)
    return (
        network,
        params.to(device, dtype),
        {name: _cast(buffer, dtype).to(device) for name, buffer in buffers.items()},
    )


def _cast(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    return buffer.to(dtype) if buffer.is_floating_point() else buffer


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def network_builder(program: Mapping[str, Any], input_shape: tuple[int, ...], classes: int) -> Callable[[], nn.Module]:
    """Return a function that builds the network which a program names, for examples of a shape."""
    plugin = get("network", str(program["network"]))
    entry = plugin.load()
    settings = {name: program[name] for name in plugin.arguments}
    return lambda: entry(input_shape, classes, **settings)


def buffers_of(outcomes: Sequence[Outcome], device: torch.device) -> Buffers:
    """Return the stacked buffers of models that have ended."""
    names = outcomes[0].buffers
    return {name: torch.stack([outcome.buffers[name] for outcome in outcomes]).to(device) for name in names}
