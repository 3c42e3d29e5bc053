"""What is learned: the loss of one example, what it weighs in a batch, and its scores, for each kind of task.

| task | loss of an example | scores |
|---|---|---|
| classification | cross-entropy, nats | accuracy |
| regression | mean squared error over its outputs | none |
| segmentation | mean cross-entropy over its pixels, nats | pixel accuracy, Dice |

With class weights w, an example of which P pixels (1 in a classification) have the classes y_p has

    loss = (1/P) sum_p w_{y_p} l_p,    weight = (1/P) sum_p w_{y_p},    loss of a batch = sum losses / sum weights,

as torch normalises a weighted cross-entropy. The weights are first divided by their mean over the training targets of
the data set. So the mean loss of the examples of that set is torch's weighted cross-entropy of the whole set, and the
loss of a set, which the tables and the measures hold, is a mean over examples of one function, whichever set it is.

The Dice coefficient of an image is 2 |P and T| / (|P| + |T|) for the pixels P that are predicted to be of a class and
the pixels T that are of it, 1 where there are neither, averaged over the classes but the first, the background (Dice
1945).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flatmin.errors import RequestError
from flatmin.labels import parse_label
from flatmin.sharpness.losses import PerExample, classes_first, cross_entropy, squared_error
from flatmin.trainables.dataset import Dataset, Task
from flatmin.trainables.training import Recipe


@dataclass(frozen=True)
class Objective:
    """What a network is trained for.

    Attributes:
        task: The kind of task.
        class_weights: What each class weighs, 1 on average over the training targets, `[classes]`; None where all
            count alike.
    """

    task: Task
    class_weights: Tensor | None = None

    @property
    def of_example(self) -> PerExample:
        """The loss that measures take: of outputs `[n, ...]` and targets `[n, ...]`, one number per example."""
        if self.task == "classification" and self.class_weights is None:
            return cross_entropy
        return squared_error if self.task == "regression" else self._weighted

    @property
    def has_labels(self) -> bool:
        """Whether every example has one class."""
        return self.task == "classification"

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the scores."""
        of_classes = {
            "regression": (),
            "classification": ("acc", "acc_clean"),
            "segmentation": ("acc", "acc_clean", "dice"),
        }
        return ("loss", *of_classes[self.task])

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Return the loss of every example `[K, b]`, in at least fp32.

        Args:
            outputs: `[K, b, ...]`.
            targets: `[K, b, ...]`.
            smoothing: The share of the target that each model spreads evenly over all classes, `[K]`. As in torch, a
                class's share is weighted as the class is, and the example still as its own class is.
        """
        flat, y = outputs.flatten(0, 1), targets.flatten(0, 1)
        losses = self.of_example(flat, y)
        if smoothing is not None:
            share = smoothing.repeat_interleave(targets.shape[1]).to(losses.dtype)
            losses = torch.lerp(losses, self._spread(flat), share)
        return losses.reshape(targets.shape[:2])

    def slopes(self, outputs: Tensor, targets: Tensor, smoothing: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `losses` of fp32 or fp64 outputs and their derivatives by these, `[K, b, ...]`, detached.

        Those of numbers, 2 (f - y) / outputs, and of plain classes, softmax(f) - target, are written out: autograd
        takes three times as long for the outputs of a small network.
        """
        if self.task == "regression" and targets.shape == outputs.shape and targets.is_floating_point():
            return _squared_errors(outputs.detach(), targets)
        if self.task == "classification" and self.class_weights is None:
            return _cross_entropies(outputs.detach(), targets, smoothing)
        leaf = outputs.detach().requires_grad_()
        losses = self.losses(leaf, targets, smoothing)
        (slopes,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), slopes

    def weights(self, targets: Tensor) -> Tensor | None:
        """Return what examples weigh in the loss of their batch, `[K, b]`, or None where it is 1 each."""
        if self.class_weights is None:
            return None
        weights = self.class_weights[targets.long()]
        return _by_example(weights, 2)

    def scores(self, outputs: Tensor, targets: Tensor, true: Tensor) -> dict[str, Tensor]:
        """Return the scores of every example, those of `columns`, `[K, b]`.

        Args:
            outputs: `[K, b, ...]`.
            targets: `[K, b, ...]`, as used.
            true: The true targets `[b, ...]`.
        """
        found = {"loss": self.losses(outputs, targets)}
        if self.task == "regression":
            return found
        predicted = outputs.max(dim=2).indices  # five times faster than argmax where classes are not last in memory
        found["acc"] = _by_example((predicted == targets).double(), 2)
        found["acc_clean"] = _by_example((predicted == true).double(), 2)
        if self.task == "segmentation":
            found["dice"] = dice(predicted, targets, outputs.shape[2])
        return found

    def _weighted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        weights = None if self.class_weights is None else self.class_weights.to(wide.dtype)
        return _by_example(functional.cross_entropy(wide, targets.long(), weights, reduction="none"), 1)

    def _spread(self, outputs: Tensor) -> Tensor:
        """Return the loss of each example whose target is spread evenly over all classes, `[n]`."""
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        each = -wide.log_softmax(dim=1)
        if self.class_weights is not None:
            each = each * self.class_weights.to(wide.dtype).reshape(-1, *[1] * (each.dim() - 2))
        return _by_example(each.mean(dim=1), 1)


def _squared_errors(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    difference = (outputs - targets).flatten(2)
    slopes = difference * (2.0 / difference.shape[2])
    return difference.square().mean(dim=2), slopes.view(outputs.shape)


def _cross_entropies(outputs: Tensor, targets: Tensor, smoothing: Tensor | None) -> tuple[Tensor, Tensor]:
    axis = 1 if classes_first(outputs) else 2
    logs, own = outputs.movedim(2, axis).contiguous().log_softmax(dim=axis), targets.unsqueeze(axis)
    losses, slopes, rest = -logs.gather(axis, own).squeeze(axis), logs.exp(), logs.new_ones(())
    if smoothing is not None:
        share = smoothing.to(losses.dtype)[:, None]
        losses, rest = torch.lerp(losses, -logs.mean(dim=axis), share), 1.0 - share.unsqueeze(axis)
        slopes -= share.unsqueeze(axis) / outputs.shape[2]
    slopes.scatter_add_(axis, own, -rest.expand(own.shape))
    return losses, slopes.movedim(axis, 2)


def objective(dataset: Dataset, device: torch.device) -> Objective:
    """Return what a data set is learned for.

    Raises:
        RequestError: The class weights are not one positive number or 0 per class.
    """
    weights = dataset.class_weights
    if weights is None:
        return Objective(dataset.task)
    if dataset.task == "regression" or weights.shape != (dataset.classes,) or not bool((weights >= 0).all()):
        raise RequestError(
            f"class_weights {weights.tolist()} of a {dataset.task}: should be {dataset.classes} numbers from 0 on, of "
            "a classification or segmentation"
        )
    counts = torch.bincount(dataset.train_y.flatten(), minlength=dataset.classes)
    mean = (weights.double().cpu() * counts.cpu()).sum() / counts.sum()
    if mean == 0:
        raise RequestError(f"class_weights {weights.tolist()}: every class that occurs has weight 0")
    return Objective(dataset.task, (weights.double() / mean).to(device))


def dice(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Return the Dice coefficient of every image, averaged over all classes but the first, `[K, b]`.

    Args:
        predicted: Classes `[K, b, height, width]`.
        targets: Classes `[K, b, height, width]`.
        classes: How many there are.
    """
    found = []
    for own in range(1, classes):
        p, t = (predicted == own).flatten(2), (targets == own).flatten(2)
        size = (p.sum(dim=2) + t.sum(dim=2)).double()
        found.append(torch.where(size > 0, 2 * (p & t).sum(dim=2) / size, 1.0))
    return torch.stack(found).mean(dim=0)


def check_recipes(task: Task, recipes: Sequence[Recipe]) -> None:
    """Refuse what a task has no meaning for.

    Raises:
        RequestError: Smoothing without classes.
    """
    for recipe in recipes:
        if recipe.label_smoothing > 0 and task == "regression":
            raise RequestError(f"label_smoothing = {recipe.label_smoothing:g}: a regression has no classes; give 0")


def check_outputs(dataset: Dataset, network: str, outputs: tuple[int, ...]) -> None:
    """Refuse a network whose outputs a task has no meaning for.

    Args:
        dataset: The data set.
        network: The network's name.
        outputs: The shape of what it makes of one example.

    Raises:
        RequestError: A class is needed for each pixel and it gives one for an image, or the other way round.
    """
    wanted = (dataset.classes, *dataset.input_shape[1:]) if dataset.task == "segmentation" else (dataset.classes,)
    if outputs != wanted:
        raise RequestError(
            f"'{network}' makes outputs {list(outputs)} of an example, and this {dataset.task} needs {list(wanted)}; "
            + ("write network: unet" if dataset.task == "segmentation" else "take a network that gives one per class")
        )


_OF_LABELS = {"margin"}
"""Measures of one class per example."""

_OF_CLASSES = {"shannon_entropy"}
"""Measures of outputs that are logits of classes."""


def check_measure(task: Task, text: str) -> None:
    """Refuse a measure that a task has no meaning for, before hours of training.

    Args:
        task: The kind of task.
        text: The measure's label.

    Raises:
        RequestError: The measure needs classes, or classes by example.
    """
    label = parse_label(text)
    if task != "classification" and label.measure in _OF_LABELS:
        raise RequestError(f"'{text}': '{label.measure}' needs a class for each example, and this is a {task}")
    if task == "segmentation" and (label.common["loss"] != "own" or label.common["label_smoothing"] > 0):
        raise RequestError(f"'{text}': the loss of a segmentation is its own; leave loss= and label_smoothing= out")
    if task != "regression":
        return
    if label.measure in _OF_CLASSES or label.arguments.get("normalise_logits"):
        raise RequestError(f"'{text}': it needs outputs by class, and this is a regression")
    if label.common["loss"] == "cross_entropy" or label.common["label_smoothing"] > 0:
        raise RequestError(f"'{text}': a cross-entropy needs classes, and this is a regression; leave loss= out")


def _by_example(values: Tensor, axes: int) -> Tensor:
    """Return the mean of each example's values, which lie behind the first axes."""
    return values if values.dim() == axes else values.flatten(axes).mean(dim=axes)
