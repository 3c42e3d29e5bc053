"""The first principal component of examples: the direction in which they vary most.

With the rows x_i less their mean as a matrix X `[n, d]`, it is the eigenvector of X^T X with the largest eigenvalue, of
length 1, whose largest entry is positive. Where d is small that matrix is taken apart; else ARPACK takes products with
it (Lehoucq, Sorensen and Yang 1998), to the last digit and from the same start, and no more than some vectors `[d]` and
one batch are held. All is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

_MATRIX = 2048
"""Columns of the largest matrix that is taken apart: 32 MiB."""

Examples = Callable[[], Iterable[Tensor]]


def first_component(examples: Examples) -> tuple[Tensor, Tensor]:
    """Return the first principal component and the mean of examples, float64 `[d]` each.

    Args:
        examples: Returns the examples in some batches, `[b, ...]` each. Where all are alike any direction will do.
    """
    count, total = 0, torch.zeros(1, dtype=torch.float64)
    for part in examples():
        count, total = count + len(part), total.to(part.device) + part.flatten(1).double().sum(dim=0)
    mean = total / count
    component = _by_matrix(examples, mean) if len(mean) <= _MATRIX else _by_products(examples, mean)
    return component * component[component.abs().argmax()].sign(), mean


def _centred(examples: Examples, mean: Tensor) -> Iterator[Tensor]:
    return (part.flatten(1).double() - mean for part in examples())


def _by_matrix(examples: Examples, mean: Tensor) -> Tensor:
    moment = mean.new_zeros(len(mean), len(mean))
    for part in _centred(examples, mean):
        moment.addmm_(part.T, part)
    component: Tensor = torch.linalg.eigh(moment).eigenvectors[:, -1]
    return component


def _by_products(examples: Examples, mean: Tensor) -> Tensor:
    def product(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        v = torch.from_numpy(vector.ravel()).to(mean.device)
        total = torch.zeros_like(mean)
        for part in _centred(examples, mean):
            total += part.T @ (part @ v)
        return total.cpu().numpy()

    d = len(mean)
    _, vectors = eigsh(LinearOperator((d, d), matvec=product, dtype=np.float64), k=1, which="LA", v0=np.ones(d))
    return torch.from_numpy(vectors[:, 0]).to(mean.device)
