"""Settings in updates that pass over all weights as seldom as they can: terms that no model has are left out."""

from __future__ import annotations

import torch
from torch import Tensor


def scalar(setting: float | Tensor, like: Tensor) -> Tensor:
    """Return a setting, one number or one for each model, in the type and on the device of a tensor."""
    return torch.as_tensor(setting, dtype=like.dtype, device=like.device)


def matters(setting: float) -> bool:
    """Return whether a setting, one number or one for each model, is anything but 0."""
    return bool(torch.as_tensor(setting, dtype=torch.float64).any())


def root(square: Tensor) -> Tensor:
    """Return the square roots of numbers from 0 on.

    MKL's takes ten times as long for 0 as for other numbers, and a second moment is 0 wherever a ReLU is dead; the root
    of the least normal number, 1e-19 in fp32, is nothing beside what is added to a denominator.
    """
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt_() if square.is_cpu else square.sqrt()
