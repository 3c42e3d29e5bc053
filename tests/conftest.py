"""What all tests share."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("RAY_worker_niceness", "0")
"""By default Ray's workers come behind all other processes, and so behind the tests beside them."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors here are small: a second thread only waits, and beside other work it waits a hundred times longer."""
    torch.set_num_threads(1)
