"""The sampling error of a measure of a subset, by the jackknife over parts of it.

A subset of m of n examples is cut into P consecutive parts of about m / P, which are random, as the subset's order is.
Sums over examples are kept by part as they are made, at no further pass, and with v_p what a measure makes of the
sums without part p, h_p = m / m_p, v of all m,

    bias      b = sum (1 - 1 / h_p) v_p - (P - 1) v
    variance    = 1/P sum (h_p v - (h_p - 1) v_p - v + b)^2 / (h_p - 1)
    sampling error^2 = (variance + b^2) (1 - m / n)

(for parts of one size: variance = (P - 1) / P sum (v_p - mean)^2, b = (P - 1) (mean - v)). Exact for means of examples
and to first order for smooth functions of them; b, of what falls like 1 / m, as a largest eigenvalue does, is added and
not taken off. Sources: Quenouille 1956; Wolter, Introduction to Variance Estimation, 2007, chapter 4 (with the
finite-population correction); Busing, Meijer and van der Leeden 1999 (parts of different sizes).
"""

from __future__ import annotations

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor


def replicates(parts: Tensor, shares: Tensor) -> Tensor:
    """Return a mean over examples and the same without each part, `[1 + P, ...]`.

    Args:
        parts: What each part adds to the mean, `[P, ...]`.
        shares: The parts' shares of the examples, `[P]`.
    """
    whole = parts.sum(dim=0, keepdim=True)
    left = 1.0 - shares.reshape(-1, *[1] * (parts.dim() - 1))
    return torch.cat([whole, (whole - parts) / left])


def sampling_variance(
    value: Tensor, without: Tensor, shares: Tensor, left_out: float, wider: Tensor | float = 1.0
) -> Tensor:
    """Return the mean squared error that drawing the examples adds to values `[K]`.

    Args:
        value: Of all examples of the subset.
        without: Of all but each part, `[P, K]`.
        shares: The parts' shares of the subset, `[P]`.
        left_out: The share of the whole set that is not in the subset.
        wider: What multiplies the root of the variance, `[K]`: see `widening`.
    """
    h = (1.0 / shares)[:, None]
    bias = ((1.0 - 1.0 / h) * without).sum(dim=0) - (len(without) - 1) * value
    variance = ((pseudo_values(value, without, shares) - value + bias).square() / (h - 1.0)).mean(dim=0)
    return (variance * wider**2 + bias.square()) * left_out


def pseudo_values(value: Tensor, without: Tensor, shares: Tensor) -> Tensor:
    """Return what each part alone says of a value, h_p v - (h_p - 1) v_p, `[P, K]`; arguments as above."""
    h = (1.0 / shares)[:, None]
    return h * value - (h - 1.0) * without


def widening(samples: Tensor) -> Tensor:
    """Return how many times 1.96 standard errors of the mean of a few samples make a 95 % interval, `[K]`.

    The quantile of Student's t, and Edgeworth's term for skewness g, by which an interval that is symmetric is wrong,

        t_{P - 1} / z (1 + (z^4 + 2 z^2 - 3) / 18 g^2 / P),    z = 1.96,

    g^2 less what it is of P normal numbers. Source: Hall, The Bootstrap and Edgeworth Expansion, 1992, section 2.6.

    Args:
        samples: `[P, K]`.
    """
    p, z = len(samples), float(ndtri(0.975))
    centred = samples - samples.mean(dim=0)
    of_chance = 6 * (p - 2) / ((p + 1) * (p + 3))
    skew = centred.pow(3).mean(dim=0) / centred.square().mean(dim=0).pow(1.5)
    excess = (skew.square() - of_chance).nan_to_num(0.0).clamp(min=0.0)
    return float(stdtrit(p - 1, 0.975)) / z * (1.0 + (z**4 + 2 * z**2 - 3) / 18 * excess / p)


def mean_of_first(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of each model's first values, `[..., K]`.

    Args:
        values: `[S, ..., K]`.
        counts: How many of the S, int64 `[K]`.
    """
    place = torch.arange(len(values), device=values.device).reshape(-1, *[1] * (values.dim() - 1))
    return torch.where(place < counts, values, 0.0).sum(dim=0) / counts
