"""Small studies for the orchestrator's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TINY = """\
study: tiny
about: A few seconds of training.
source: nobody
settings: {dataset: digits, network: mlp, optimizer: sgd, lr: 0.05, batch_size: 250, epochs: 4}
axes:
  width: [2, 4]
seeds: 2
"""


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a study file and returns its path."""

    def write(text: str = TINY) -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(text)
        return file

    return write
