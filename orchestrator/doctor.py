"""What of this machine works: one row per check, with the mend where something does not."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flatmin.errors import DataError, MissingData
from flatmin.files import data_root
from flatmin.plugins import Plugin, listing
from flatmin.settings import REQUIRED


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        check: What.
        ok: Whether it works; a data set that is not there is no fault.
        found: What was found.
        mend: What to do when it does not, or is not there; empty when it does.
    """

    check: str
    ok: bool
    found: str
    mend: str = ""


def doctor() -> list[Check]:
    """Look at the interpreter, the packages, Ray, the accelerator, the data and the disk."""
    return [
        _python(),
        *(_package(name) for name in ("torch", "torchvision", "ray", "pyarrow", "duckdb", "plotly")),
        _run("ray starts", _ray, "see the message; a firewall or a full /tmp are the usual causes"),
        _run("gpu", _gpu, "install a driver that matches torch's CUDA, or go on with the CPU"),
        _run("data folder", _data_folder, "set FLATMIN_DATA to a folder that can be written"),
        *(_data(plugin) for plugin in listing("dataset").values()),
        _run("disk", _disk, "free some space: a study keeps the weights of its models"),
    ]


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, sys.version.split()[0], "" if ok else "install Python 3.11 or newer")


def _package(name: str) -> Check:
    try:
        importlib.import_module(name)
        return Check(name, True, metadata.version(name))
    except Exception as error:  # a broken binary package raises what it likes
        return Check(name, False, f"{type(error).__name__}: {error}", f"pip install --upgrade --force-reinstall {name}")


def _run(name: str, look: Callable[[], str], mend: str) -> Check:
    try:
        return Check(name, True, look())
    except Exception as error:  # whatever is wrong is the finding
        return Check(name, False, f"{type(error).__name__}: {error}", mend)


def _ray() -> str:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray.get(ray.remote(lambda: None).remote())
        return "a private cluster ran a task"
    finally:
        ray.shutdown()


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none; the CPU is used"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    torch.ones(8, device="cuda").sum().item()
    return ", ".join(names)


def _data(plugin: Plugin) -> Check:
    """Load a data set with its default settings, as training would, but do not download it."""
    from flatmin.trainables.job import load_dataset

    name = f"data: {plugin.name}"
    settings = {argument.name: argument.default for argument in plugin.arguments.values()}
    asked = [setting for setting, value in settings.items() if value is REQUIRED]
    if asked:
        return Check(name, True, f"not looked at: it needs {', '.join(asked)}")
    try:
        dataset = load_dataset((("dataset", plugin.name), *settings.items()))
    except MissingData as error:
        return Check(name, True, "not there", error.mend)
    except DataError as error:
        return Check(name, False, error.found, error.mend)
    except Exception as error:  # whatever is wrong is the finding
        return Check(name, False, f"{type(error).__name__}: {error}", "see the message")
    return Check(name, True, f"{len(dataset.train_x)} to train, {len(dataset.test_x)} to test")


def _data_folder() -> str:
    root = data_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=root):
        return str(root)


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < 1e9:
        raise OSError(f"{free / 1e6:.0f} MB free here")
    return f"{free / 1e9:.0f} GB free here"
