"""The training recipe: the settings that every model has, whatever its network and optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from flatmin.settings import Setting

Augmentation = Literal[
    "none", "flip", "crop_flip", "crop_flip_cutout", "autoaugment_cutout", "random_resized_crop_flip"
]
"""What `flatmin.trainables.augmentation` can do to images."""


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
    label_smoothing: float
    label_noise: float
    label_noise_kind: str
    data_noise: float
    data_noise_clip: bool
    train_size: int | None
    imbalance: float
    val_size: int
    split_seed: int
    augmentation: str
    cutout_size: int
    eval_every: int
    precision: str
    bn_updates: str
    shuffle: bool
    stand_in: bool

    def lr_factor(self, epoch: int, step: int, steps: int) -> float:
        """Return what the learning rate is multiplied by in a step (epochs and their steps are counted from 0).

        `step`: lr_decay once per milestone passed; `cosine`: from 1 down to 0 over `epochs`, one value
        per epoch (Loshchilov and Hutter 2017, eq. 5, without restarts); `cosine_steps`: one value per step.

        Args:
            epoch: The epoch.
            step: The step of that epoch.
            steps: How many steps an epoch has.
        """
        if self.schedule == "step":
            return self.lr_decay ** sum(epoch >= milestone for milestone in self.milestones)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        if self.schedule == "cosine_steps":
            return 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (self.epochs * steps)))
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
        Literal["constant", "step", "cosine", "cosine_steps"],
        Setting(about="How the learning rate changes: from epoch to epoch, or with every step.", per_model=True),
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
    label_smoothing: Annotated[
        float,
        Setting(
            about="Share of the target spread over all classes in the trained loss; no score and no measure has it.",
            ge=0,
            lt=1,
            per_model=True,
            neutral=0.0,
        ),
    ] = 0.0,
    label_noise: Annotated[
        float,
        Setting(
            about="Share of training labels replaced by a class drawn at random (see `label_noise_kind`).",
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
    label_noise_kind: Annotated[
        Literal["uniform", "symmetric"],
        Setting(
            about="What a noisy label is drawn from: all classes, the true one included, or the others.",
            per_model=True,
            neutral="uniform",
        ),
    ] = "uniform",
    data_noise_clip: Annotated[
        bool,
        Setting(
            about="Whether noisy inputs are cut off at 0 and 1, the range of images.", per_model=True, neutral=False
        ),
    ] = False,
    train_size: Annotated[
        int | None,
        Setting(
            about="Training examples used, at random; a smaller set is part of a larger one. All unless given.",
            unit="examples",
            ge=1,
            neutral=None,
        ),
    ] = None,
    imbalance: Annotated[
        float,
        Setting(
            about="Largest over smallest class of the training set, sizes falling exponentially with the class.",
            ge=1,
            neutral=1.0,
        ),
    ] = 1.0,
    val_size: Annotated[int, Setting(about="Training examples held out for validation.", unit="examples", ge=0)] = 0,
    split_seed: Annotated[
        int,
        Setting(
            about="Seed of which examples `val_size` holds out, and `imbalance` and `train_size` keep.", ge=0, neutral=0
        ),
    ] = 0,
    augmentation: Annotated[
        Augmentation, Setting(about="How images are changed at random in each epoch.", neutral="none")
    ] = "none",
    cutout_size: Annotated[
        int, Setting(about="Side of the square that cutout sets to zero.", unit="pixels", ge=1, neutral=16)
    ] = 16,
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
    shuffle: Annotated[
        bool,
        Setting(about="Whether every epoch has an order of its own; else examples come as they lie.", neutral=True),
    ] = True,
    stand_in: Annotated[
        bool,
        Setting(
            about="Read small generated files in the data set's own format, in place of the data set.", neutral=False
        ),
    ] = False,
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
        label_smoothing=label_smoothing,
        label_noise=label_noise,
        label_noise_kind=label_noise_kind,
        data_noise=data_noise,
        data_noise_clip=data_noise_clip,
        train_size=train_size,
        imbalance=imbalance,
        val_size=val_size,
        split_seed=split_seed,
        augmentation=augmentation,
        cutout_size=cutout_size,
        eval_every=eval_every,
        precision=precision,
        bn_updates=bn_updates,
        shuffle=shuffle,
        stand_in=stand_in,
    )
