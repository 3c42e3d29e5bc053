"""What a data set plug-in returns: examples before normalisation, and how to normalise them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Examples of a classification task.

    Attributes:
        train_x: Training inputs `[n, *shape]` in the range of the raw data scaled to [0, 1].
        train_y: True classes `[n]`, int64.
        test_x: Test inputs `[m, *shape]`.
        test_y: Test classes `[m]`.
        mean, std: What normalisation subtracts and divides by; broadcast against one example.
        classes: Number of classes.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    std: Tensor
    classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.train_x.shape[1:])
