"""What a process that trains stacks on a CPU asks of its libraries: memory that stays, and no denormal numbers."""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""


def prepare_arithmetic() -> None:
    """Set up this process for the arithmetic of stacks; it makes nothing wrong to call it again.

    Memory: weights and gradients of a stack are megabytes, which glibc takes from the kernel and gives back in every
    step, a page fault for every 4 KB; it is told to keep them. Denormal numbers, below 1e-38 in fp32, take a processor
    ten times as long as others, and second moments of small gradients are full of them; they become 0.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # it is there with glibc alone
            mallopt(_MMAP_THRESHOLD, 2**30)
            mallopt(_TRIM_THRESHOLD, 2**31 - 1)
