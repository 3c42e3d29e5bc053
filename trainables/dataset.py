"""What a data set plug-in returns: examples before normalisation, what is learned of them, and how to normalise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Task = Literal["classification", "regression", "segmentation"]


@dataclass(frozen=True)
class Dataset:
    """Examples of a task.

    Attributes:
        train_x: Training inputs `[n, *shape]`: uint8 images as they are on disk, which are divided by 255 when they
            are used, or floats as the network is to see them before normalisation. What does not fit in memory is
            `flatmin.trainables.streaming.Images`, which stand in for a tensor of images.
        train_y: Targets: true classes int64 `[n]` of a classification, values float `[n, outputs]` of a regression, the
            class of every pixel uint8 `[n, height, width]` of a segmentation.
        test_x: Test inputs `[m, *shape]`.
        test_y: Test targets.
        mean, std: What normalisation subtracts and divides by, after division by 255; broadcast against one example.
        classes: Outputs of the network: classes, or values of a regression.
        task: What is to be learned.
        class_weights: Weight of each class in the loss `[classes]`, or None where all count alike.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    std: Tensor
    classes: int
    task: Task = "classification"
    class_weights: Tensor | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.train_x.shape[1:])
