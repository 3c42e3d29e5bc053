"""What is shipped: the folders, the links, the wheel, and an installation from nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "flatmin"
FOLDERS = ("orchestrator", "trainables", "optimizers", "sharpness", "analysis")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LISTED: list[str] = PROJECT["tool"]["setuptools"]["packages"]
PACKAGE_DATA: dict[str, list[str]] = PROJECT["tool"]["setuptools"]["package-data"]
LEFT_OUT = (".git", ".venv", "build", "dist", "results", "*.egg-info", "*_cache", "__pycache__")


def folder_of(package: str) -> Path:
    """Return where a package's files are."""
    return ROOT.joinpath("src", *package.split("."))


def shipped_files() -> set[str]:
    """Return every file that an installation must have, by its path below site-packages."""
    return {
        str(file.relative_to(ROOT / "src"))
        for package in LISTED
        for file in folder_of(package).iterdir()
        if file.is_file() and not file.name.startswith(".")
    }


@dataclass(frozen=True)
class Built:
    """A distribution built from a copy of the sources, the wheel from the sdist."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build in a copy, so that no file list of an earlier build decides what is shipped."""
    place = tmp_path_factory.mktemp("build")
    copy = shutil.copytree(ROOT, place / "copy", symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    run([sys.executable, "-m", "build", "--outdir", str(place / "dist"), str(copy)])
    (sdist,) = (place / "dist").glob("*.tar.gz")
    (wheel,) = (place / "dist").glob("*.whl")
    return Built(sdist, wheel)


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; if it fails, fail with all it said."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def test_every_package_is_listed() -> None:
    found = {"flatmin"}
    for start, name in [(SOURCE / "stack", "stack"), *((ROOT / folder, folder) for folder in FOLDERS)]:
        for file in start.rglob("__init__.py"):
            found.add(".".join(["flatmin", name, *file.parent.relative_to(start).parts]))
    assert set(LISTED) == found
    assert len(LISTED) == len(set(LISTED))


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without `__init__.py` imports here as a namespace package, and is missing from the wheel."""
    starts = [SOURCE / "stack", *(ROOT / folder for folder in FOLDERS)]
    bare = [
        str(file.parent.relative_to(ROOT))
        for start in starts
        for file in start.rglob("*.py")
        if not (file.parent / "__init__.py").exists()
    ]
    assert bare == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folder_is_linked_into_the_package(folder: str) -> None:
    link = SOURCE / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{folder}"
    assert link.resolve() == ROOT / folder


def test_no_other_links_are_needed() -> None:
    assert {file.name for file in SOURCE.iterdir() if file.is_symlink()} == set(FOLDERS)


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    command = script.read_text(encoding="utf-8").splitlines()[-1]
    assert re.search(
        rf"^\s*{re.escape(command)}\s*(#|$)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_every_data_pattern_finds_files() -> None:
    empty = [
        f"{package}: {pattern}"
        for package, patterns in PACKAGE_DATA.items()
        for pattern in patterns
        if not list(folder_of(package).glob(pattern))
    ]
    assert empty == []


def test_the_wheel_has_every_file(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        metadata = {name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
    assert names == shipped_files()
    assert {"licenses/LICENSE", "entry_points.txt"} <= metadata


def test_the_sdist_has_files_in_the_place_of_links(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert [name for name, member in members.items() if member.issym() or member.islnk()] == []
    assert {f"src/{name}" for name in shipped_files()} <= set(members)


@dataclass(frozen=True)
class Installed:
    """A virtual environment that has the wheel, and a directory that has modules with our folders' names."""

    binaries: Path
    elsewhere: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs where a user's own modules come first on the path, as in a Ray worker."""
        environment = {**os.environ, "PYTHONPATH": str(self.elsewhere)}
        return run([str(self.binaries / command[0]), *command[1:]], cwd=self.elsewhere, env=environment)


@pytest.fixture(scope="module", params=["lent", pytest.param("declared", marks=pytest.mark.slow)])
def installed(
    built: Built, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Installed]:
    """Install the wheel in an environment of its own, as a user's `pip install` does.

    What it needs is lent by the environment of the tests, or is what it declares and nothing else, which takes minutes.
    """
    place = tmp_path_factory.mktemp("installed")
    binaries, elsewhere = place / "venv" / "bin", place / "elsewhere"
    elsewhere.mkdir()
    for folder in FOLDERS:
        (elsewhere / f"{folder}.py").write_text("raise RuntimeError('this is the user\\'s own module')\n")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [str(binaries / "python"), "-m", "pip", "install", "--quiet", str(built.wheel)]
    try:
        venv.create(place / "venv", with_pip=True)
        if request.param == "declared":
            run(install, env=clean)
            run([str(binaries / "python"), "-m", "pip", "check"], env=clean)
        else:
            run([*install, "--no-deps", "--no-index"], env=clean)
            (packages,) = (place / "venv").glob("lib/python*/site-packages")
            (packages / "lent.pth").write_text(sysconfig.get_path("purelib"))
        yield Installed(binaries, elsewhere)
    finally:
        shutil.rmtree(place)  # gigabytes, which pytest would keep


def test_a_clean_installation_works_beside_modules_of_the_same_names(installed: Installed) -> None:
    studies = json.loads(installed.run("flatmin-sweep", "studies", "--json").stdout)
    assert "digits-double-descent" in {study["name"] for study in studies}
    found = installed.run("python", "-c", "import flatmin.analysis; print(flatmin.analysis.__file__)").stdout
    assert Path(found.strip()).is_relative_to(installed.binaries.parent)
