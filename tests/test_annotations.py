"""Types of settings read from source: in place, by name, from other files, never imported."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

import pytest

from flatmin import plugins
from flatmin.annotations import source
from flatmin.errors import RequestError
from flatmin.settings import Setting

BOOM = 'raise SystemExit("imported while listing")\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An importable package of its own name, whose files must not be run."""
    place = tmp_path / f"package_{abs(hash(request.node.name))}"
    place.mkdir()
    (place / "__init__.py").write_text(BOOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    return place


def read(
    package: Path, monkeypatch: pytest.MonkeyPatch, head: str, annotation: str, default: str = "1"
) -> plugins.Plugin:
    (package / "toy.py").write_text(
        f"{BOOM}{head}\ndef toy(*, lr: {annotation} = {default}) -> Base:\n    '''A toy.'''\n"
    )
    point = metadata.EntryPoint("toy", f"{package.name}.toy:toy", "flatmin.optimizers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    plugin = plugins.listing("optimizer")["toy"]
    assert not {name for name in sys.modules if name.startswith(package.name)}
    return plugin


def test_a_measure_may_take_its_settings_from_the_shared_ones() -> None:
    metric = plugins.get("measure", "lpf").arguments["metric"]
    assert metric.annotation == Literal["identity", "filter", "element"]
    assert metric.setting.about == "In which units weights are displaced."
    tolerance = plugins.get("measure", "hessian_trace").arguments["tolerance"]
    assert (tolerance.annotation, tolerance.default, tolerance.setting.gt) == (float, 0.02, 0)


@pytest.mark.parametrize(
    ("head", "annotation"),
    [
        ("Rate = Annotated[float, Setting(gt=0)]", "Rate"),
        ("Rate: TypeAlias = Annotated[float, Setting(gt=0)]", "Rate"),
        ("from {package}.shared import Rate", "Rate"),
        ("from {package}.shared import Rate as Speed", "Speed"),
        ("from .shared import Rate", "Rate"),
        ("from . import Rate", "Rate"),
        ("from {package} import Rate", "Rate"),
        ("if TYPE_CHECKING:\n    from .shared import Rate", "Rate"),
        ("from .shared import Number", "Annotated[Number, Setting(gt=0)]"),
        ("from .shared import Rate", "'Rate'"),
        ("from .shared import Rate", "Annotated[Rate, Setting(gt=0, about='again')]"),
    ],
)
def test_a_name_is_followed_to_where_it_is_given(
    package: Path, monkeypatch: pytest.MonkeyPatch, head: str, annotation: str
) -> None:
    (package / "shared.py").write_text(f"{BOOM}Number = float\nRate = Annotated[Number, Setting(gt=0)]\n")
    (package / "__init__.py").write_text(f"{BOOM}from .shared import Rate\n")
    plugin = read(package, monkeypatch, head.format(package=package.name), annotation)
    assert plugin.arguments["lr"].annotation is float
    assert plugin.arguments["lr"].setting.gt == 0
    assert plugin.arguments["lr"].setting.about == ("again" if "again" in annotation else "")


def test_plain_types_need_no_setting(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = read(package, monkeypatch, "Steps = tuple[int, ...]", "Steps | None", "None")
    assert plugin.arguments["lr"].annotation == tuple[int, ...] | None
    assert plugin.arguments["lr"].setting == Setting()


@pytest.mark.parametrize(
    ("head", "annotation", "message"),
    [
        ("", "Rate", r"'Rate' is neither given in .*toy\.py nor imported there by `from module import Rate`"),
        ("from nowhere_at_all import Rate", "Rate", "imported from nowhere_at_all, whose source file cannot be found"),
        ("from .missing import Rate", "Rate", r"imported from \w+\.missing, whose source file cannot be found"),
        ("from .shared import Other", "Other", r"'Other' is neither given in .*shared\.py"),
        ("Rate = Rate", "Rate", "'Rate' stands for itself"),
        ("One = Two\nTwo = One", "One", "stands for itself"),
        ("", "open('x')", r"`open\('x'\)` is in it"),
        ("", "shared.Rate", r"`shared\.Rate` is in it"),
        ("", "Annotated[float, Setting(speed=1)]", "unexpected keyword argument 'speed'"),
    ],
)
def test_what_cannot_be_read_names_file_and_setting_and_what_is_possible(
    package: Path, monkeypatch: pytest.MonkeyPatch, head: str, annotation: str, message: str
) -> None:
    (package / "shared.py").write_text("Rate = float\n")
    with pytest.raises(RequestError, match=message) as caught:
        read(package, monkeypatch, head, annotation)
    assert str(caught.value).startswith(f"{package / 'toy.py'}: the type of the setting 'lr', {annotation}, cannot be")
    assert "`from module import Name`" in str(caught.value)


def test_a_setting_without_a_type_and_a_default_that_is_computed_are_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=r"toy\.py: the default of the setting 'lr', 2 \*\* 3, is not a plain value"):
        read(package, monkeypatch, "", "float", "2 ** 3")
    (package / "bare.py").write_text("def bare(*, lr=1) -> Base: ...\n")
    point = metadata.EntryPoint("bare", f"{package.name}.bare:bare", "flatmin.optimizers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    with pytest.raises(RequestError, match=r"bare\.py: the setting 'lr' has no type\. A type is made of"):
        plugins.listing("optimizer")


def test_refusals_are_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = read(package, monkeypatch, 'REFUSES = {"subset": "it is slow"}', "float")
    assert plugin.refuses == {"subset": "it is slow"}
    (package / "second.py").write_text("REFUSES = dict(a=1)\ndef second() -> Base: ...\n")
    point = metadata.EntryPoint("second", f"{package.name}.second:second", "flatmin.optimizers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    with pytest.raises(RequestError, match=r"second\.py: REFUSES = dict\(a=1\) is not a plain dictionary"):
        plugins.listing("optimizer")


def test_sources_are_found_without_an_import(package: Path) -> None:
    (package / "inner").mkdir()
    (package / "inner" / "deep.py").write_text(BOOM)
    found = source(f"{package.name}.inner.deep")
    assert found is not None
    assert found.file == package / "inner" / "deep.py"
    assert source("math") is None, "a module without a source file"
    assert source("flatmin.nothing") is None
    ours = source("flatmin.sharpness")
    assert ours is not None
    assert ours.file.name == "__init__.py"
