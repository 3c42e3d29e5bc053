"""What tests of networks and of a study's training share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

Smallest = Callable[[str], tuple[tuple[int, ...], dict[str, Any]]]

_SMALLEST: Mapping[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "lenet5": ((1, 16, 16), {}),
    "pyramidnet": ((1, 8, 8), {"depth": 8, "pyramid_alpha": 6}),
    "resnet18": ((1, 8, 8), {"width": 2}),
    "resnet18_imagenet": ((1, 8, 8), {"width": 2}),
    "resnet18_narrow": ((1, 8, 8), {"width": 1}),
    "resnet18_wide": ((1, 8, 8), {"width": 2}),
    "resnet50": ((1, 16, 16), {"width": 2}),
    "resnet101": ((1, 16, 16), {"width": 2}),
    "shake_shake": ((1, 8, 8), {"depth": 8, "width": 4}),
    "unet": ((1, 32, 32), {"width": 2}),
    "vgg16_bn": ((1, 8, 8), {"width": 2}),
    "wideresnet": ((1, 8, 8), {"depth": 10, "width": 1, "dropout": 0.3}),
}


@pytest.fixture(scope="session")
def smallest() -> Smallest:
    """Return a function from a network's name to the shape of small images and settings that make it small.

    A network that is not named here takes 8 x 8 images and its defaults.
    """
    return lambda name: _SMALLEST.get(name, ((1, 8, 8), {}))


Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that installs a module whose functions are plug-ins of groups; it returns the module's file."""
    installed = metadata.entry_points

    def write(module: str, text: str, groups: Mapping[str, Sequence[str]]) -> Path:
        folder = tmp_path / "package"
        folder.mkdir()
        file = folder / f"{module}.py"
        file.write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, module, raising=False)

        def entry_points(*, group: str | None = None) -> Any:
            own = [metadata.EntryPoint(name, f"{module}:{name}", str(group)) for name in groups.get(str(group), [])]
            return own or (installed() if group is None else installed(group=group))

        monkeypatch.setattr(metadata, "entry_points", entry_points)
        return file

    return write
