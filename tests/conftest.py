"""What all tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors here are small: a second thread only waits, and beside other work it waits a hundred times longer."""
    torch.set_num_threads(1)
