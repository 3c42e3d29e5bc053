"""What cannot be read is made again only where it is known to be damaged or gone."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from flatmin import scan
from flatmin.errors import ResultsError
from flatmin.orchestrator.heal import heal, lost_weights
from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.results import Results

Write = Callable[..., Path]


@pytest.fixture
def results(write_study: Write, tmp_path: Path) -> Results:
    return launch(str(write_study()), tmp_path / "r", ["width=2", "epochs=1"], LaunchOptions(inline=True)).results


def test_a_file_that_the_system_does_not_give_is_kept(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share that is away, or a bucket: what is there and whole must not be removed for that."""
    (file,) = (results.directory / "models").glob("*.parquet")

    def away(asked: Path, table: str, expected: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(asked))

    monkeypatch.setattr(scan, "rows_of", away)
    with pytest.raises(ResultsError, match="Input/output error; nothing was removed"):
        heal(results, Console(file=io.StringIO()))
    monkeypatch.undo()
    assert file.exists()
    assert len(results.models()) == 2


def test_weights_that_the_system_does_not_give_are_not_lost(results: Results) -> None:
    (file,) = (results.directory / "checkpoints").glob("*.safetensors")
    whole = file.read_bytes()
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(ResultsError, match=f"{file.name}' cannot be read: Too many levels of symbolic links"):
        lost_weights(results)
    file.unlink()
    assert lost_weights(results) == [file.stem]
    file.write_bytes(whole[:20])
    assert lost_weights(results) == [file.stem]
    file.write_bytes(whole)
    assert lost_weights(results) == []
