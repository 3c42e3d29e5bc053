"""A network of a benchmark's own, plugged in as another distribution would be, and a study of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def plugged_in(network: str, source: str, study: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """Give a folder with `study.yaml`, and the environment in which the network is installed.

    Args:
        network: Its name, and that of its file and entry function.
        source: The text of the file.
        study: The text of the study.
    """
    with tempfile.TemporaryDirectory(prefix=f"{network}-") as name:
        folder = Path(name)
        (folder / f"{network}.py").write_text(source)
        (folder / "study.yaml").write_text(study)
        info = folder / f"{network}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {network}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[flatmin.networks]\n{network} = {network}:{network}\n")
        path = os.pathsep.join(filter(None, [name, os.environ.get("PYTHONPATH", "")]))
        yield folder, {**os.environ, "PYTHONPATH": path}
