"""Data sets that are not there: what `doctor` and `plan` say of them, and that a launch alone downloads them."""

from __future__ import annotations

import gzip
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torchvision.datasets import MNIST
from typer.testing import CliRunner

from flatmin.orchestrator.cli import app
from flatmin.orchestrator.doctor import Check, doctor
from flatmin.orchestrator.estimate import estimate
from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.orchestrator.plan import plan
from flatmin.results import Results

Write = Callable[..., Path]

STUDY = """\
study: greys
settings: {dataset: mnist, network: mlp, width: 3, optimizer: sgd, lr: 0.1, batch_size: 20, epochs: 2}
seeds: 2
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the data folder, which is not there yet."""
    folder = tmp_path / "data"
    monkeypatch.setenv("FLATMIN_DATA", str(folder))
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve a small MNIST as the published one, from a folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    generator, resources = np.random.default_rng(0), []
    for name, n in (("train", 60), ("t10k", 20)):
        files = {
            "images-idx3": generator.integers(0, 256, (n, 28, 28), dtype=np.uint8),
            "labels-idx1": np.arange(n, dtype=np.uint8) % 10,
        }
        for kind, data in files.items():
            header = struct.pack(f">HBB{data.ndim}I", 0, 8, data.ndim, *data.shape)
            packed = gzip.compress(header + data.tobytes())
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(packed)
            resources.append((f"{name}-{kind}-ubyte.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{running.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    yield folder
    running.shutdown()
    thread.join()
    running.server_close()


def looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.setattr("flatmin.orchestrator.doctor._ray", lambda: "not started here")
    return next(check for check in doctor() if check.check == f"data: {name}")


def test_a_plan_tells_of_data_that_is_not_there_and_downloads_nothing(
    root: Path, server: Path, write_study: Write
) -> None:
    cost = estimate(plan(str(write_study(STUDY))).trials)
    assert f"mnist is not at {root}/MNIST/raw, which has no train-images-idx3-ubyte; its published" in cost.basis
    shown = CliRunner().invoke(app, ["plan", str(write_study(STUDY))])
    assert shown.exit_code == 0
    assert "if every model trains all its epochs; mnist is not at" in shown.stdout
    assert [place.name for place in root.iterdir()] == ["costs"]


def test_a_launch_downloads_what_it_needs(
    root: Path, server: Path, write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    console = Console(file=StringIO(), width=200)
    launch(str(write_study(STUDY)), results, [], LaunchOptions(inline=True), console)
    assert Results.open(results).table("models").num_rows == 2
    assert "mnist is not at" not in estimate(plan(str(write_study(STUDY))).trials).basis
    found = looked_at("mnist", monkeypatch)
    assert (found.ok, found.found, found.mend) == (True, "60 to train, 20 to test", "")


def test_doctor_tells_what_is_not_there_from_what_is_damaged(
    root: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = looked_at("mnist", monkeypatch)
    assert (missing.ok, missing.found) == (True, "not there")
    assert missing.mend.startswith("`flatmin-sweep launch` downloads it; or put there what http")
    assert missing.mend.count(f"\n  {root}/MNIST/raw/") == 4
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for packed in server.iterdir():
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    file = folder / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    damaged = looked_at("mnist", monkeypatch)
    assert not damaged.ok
    assert damaged.found.startswith(f"{file} is damaged (1,000 bytes): ")
    assert damaged.mend.startswith("remove it; it is unpacked")
