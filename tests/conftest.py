"""What all tests share."""

from __future__ import annotations

import pytest
import torch

_RUNS = ("tests/faults/", "tests/orchestrator/", "tests/test_readme.py", "tests/test_packaging.py")
"""Tests that start Ray, kill processes or install packages."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, for they share fixtures, and those that start processes one at a time."""
    for item in items:
        file = item.path.relative_to(config.rootpath).as_posix()
        item.add_marker(pytest.mark.xdist_group("runs" if file.startswith(_RUNS) else file))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors here are small: a second thread only waits, and beside other work it waits a hundred times longer."""
    torch.set_num_threads(1)
