"""The training recipe: the settings that every model has, whatever its network and optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from flatmin.settings import Setting


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; the fields are the settings of `training`."""

    seed: int
    init_seed: int
    order_seed: int
    noise_seed: int
    batch_size: int
    epochs: int
    schedule: str
    milestones: tuple[int, ...]
    lr_decay: float
    stop_loss: float
    max_loss: float
    label_noise: float
    data_noise: float
    val_size: int
    eval_every: int
    precision: str
    bn_updates: str

    def lr_factor(self, epoch: int) -> float:
        """Return what the learning rate is multiplied by in an epoch (counted from 0).

        `step`: lr_decay once per milestone passed; `cosine`: from 1 down to 0 over `epochs`, one value
        per epoch (Loshchilov and Hutter 2017, eq. 5, without restarts).
        """
        if self.schedule == "step":
            return self.lr_decay ** sum(epoch >= milestone for milestone in self.milestones)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return 1.0

    def evaluates(self, epochs_done: int) -> bool:
        """Whether this model is evaluated once that many epochs are done."""
        return epochs_done % self.eval_every == 0 or epochs_done == self.epochs


def training(
    *,
    seed: Annotated[int, Setting(about="Seed of every stream that has none of its own.", ge=0, per_model=True)] = 0,
    init_seed: Annotated[
        int | None, Setting(about="Seed of the initial weights; `seed` unless given.", ge=0, per_model=True)
    ] = None,
    order_seed: Annotated[
        int | None,
        Setting(
            about="Seed of what is drawn while training: the order of the examples, dropout; `seed` unless given.",
            ge=0,
            per_model=True,
        ),
    ] = None,
    noise_seed: Annotated[
        int | None,
        Setting(about="Seed of label noise and data noise; `seed` unless given.", ge=0, per_model=True),
    ] = None,
    batch_size: Annotated[int, Setting(about="Examples in a step.", unit="examples", ge=1)] = 128,
    epochs: Annotated[int, Setting(about="Passes over the training set.", unit="epochs", ge=1, per_model=True)] = 100,
    schedule: Annotated[
        Literal["constant", "step", "cosine"],
        Setting(about="How the learning rate changes from epoch to epoch.", per_model=True),
    ] = "constant",
    milestones: Annotated[
        tuple[int, ...],
        Setting(about="Epochs at which the step schedule decays.", unit="epochs", ge=1, per_model=True),
    ] = (),
    lr_decay: Annotated[
        float, Setting(about="Factor of the learning rate at each milestone.", gt=0, per_model=True)
    ] = 0.1,
    stop_loss: Annotated[
        float,
        Setting(
            about="Training loss (eval mode, whole set) at which a model has converged; 0: never.",
            unit="nats",
            ge=0,
            per_model=True,
        ),
    ] = 0.0,
    max_loss: Annotated[
        float,
        Setting(
            about="Loss of a training batch above which a model has diverged, as at a non-finite one.",
            unit="nats",
            gt=0,
            per_model=True,
        ),
    ] = 1e4,
    label_noise: Annotated[
        float,
        Setting(
            about="Share of training labels replaced by a class drawn from all classes, the true one included.",
            unit="fraction",
            ge=0,
            le=1,
            per_model=True,
        ),
    ] = 0.0,
    data_noise: Annotated[
        float,
        Setting(
            about="Standard deviation of Gaussian noise on the training inputs, drawn once, before normalisation.",
            unit="input range",
            ge=0,
            per_model=True,
        ),
    ] = 0.0,
    val_size: Annotated[int, Setting(about="Training examples held out for validation.", unit="examples", ge=0)] = 0,
    eval_every: Annotated[int, Setting(about="Epochs between evaluations.", unit="epochs", ge=1)] = 1,
    precision: Annotated[
        Literal["fp32", "tf32", "bf16", "fp64"],
        Setting(about="Arithmetic of training; bf16 is autocast over fp32 weights."),
    ] = "fp32",
    bn_updates: Annotated[
        Literal["once", "all", "none"],
        Setting(
            about="Passes of a step that update BatchNorm's running statistics: the first over an example; all; none.",
            neutral="once",
        ),
    ] = "once",
) -> Recipe:
    """Return the recipe of one model."""
    return Recipe(
        seed=seed,
        init_seed=seed if init_seed is None else init_seed,
        order_seed=seed if order_seed is None else order_seed,
        noise_seed=seed if noise_seed is None else noise_seed,
        batch_size=batch_size,
        epochs=epochs,
        schedule=schedule,
        milestones=tuple(milestones),
        lr_decay=lr_decay,
        stop_loss=stop_loss,
        max_loss=max_loss,
        label_noise=label_noise,
        data_noise=data_noise,
        val_size=val_size,
        eval_every=eval_every,
        precision=precision,
        bn_updates=bn_updates,
    )
