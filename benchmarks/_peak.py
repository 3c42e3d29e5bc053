"""The most floating-point operations per second that products of matrices reach on a device, as measured here."""

from __future__ import annotations

import time

import torch


def matmul_peak(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return operations per second of the best of some products of large square matrices."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = _now(device)
        torch.mm(a, b)
        best = min(best, _now(device) - started)
    return 2 * size**3 / best


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
