"""The listing: files and entry points, read without being run."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from flatmin import plugins
from flatmin.errors import RequestError

LION = '''
"""A plug-in of somebody else's package."""
from typing import Annotated
raise SystemExit("imported while listing")
def lion(*, lr: Annotated[float, Setting(gt=0, per_model=True)] = 1e-4, note: str = "x") -> Base:
    """The lion optimizer."""
'''


@pytest.mark.parametrize("kind", ["network", "dataset", "optimizer", "training"])
def test_every_plugin_loads_and_declares_what_its_signature_says(kind: str) -> None:
    import inspect

    for name, plugin in plugins.listing(kind).items():
        entry = plugin.load()
        keyword_only = {
            parameter.name: parameter.default
            for parameter in inspect.signature(entry).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        assert {key: argument.default for key, argument in plugin.arguments.items()} == keyword_only
        assert entry.__name__ == name
        assert plugin.about


def test_an_entry_point_adds_a_plugin_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lion_module.py").write_text(LION)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = metadata.EntryPoint("lion", "lion_module:lion", "flatmin.optimizers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == "flatmin.optimizers" else [])
    found = plugins.listing("optimizer")["lion"]
    assert found.arguments["lr"].default == 1e-4
    assert found.arguments["lr"].setting.per_model
    assert found.about == "The lion optimizer."
    assert "lion_module" not in sys.modules
    assert [part.name for part in plugins.optimizer_parts("sam-lion")] == ["sam", "lion"]


def test_two_plugins_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_sgd.py").write_text(LION.replace("lion", "sgd"))
    monkeypatch.syspath_prepend(str(tmp_path))
    point = metadata.EntryPoint("sgd", "other_sgd:sgd", "flatmin.optimizers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    with pytest.raises(RequestError, match="declared twice"):
        plugins.listing("optimizer")


def test_unknown_names_give_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"no network 'mpl'\. Did you mean 'mlp'"):
        plugins.get("network", "mpl")
