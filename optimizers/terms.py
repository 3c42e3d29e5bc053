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
