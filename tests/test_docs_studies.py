"""docs/studies.md: its studies plan, its commands and example run, its plug-ins are built, installed and used."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from flatmin.orchestrator.cli import main
from flatmin.orchestrator.study import read_study
from flatmin.orchestrator.study_file import StudyFile
from flatmin.results import Results

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


STUDIES = {yaml.safe_load(text)["study"]: text for text in blocks("yaml")}
COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of the page, as a reader has them."""
    folder = tmp_path_factory.mktemp("studies")
    for name, text in STUDIES.items():
        (folder / f"{name}.yaml").write_text(text)
    (project,), (plugins, _) = blocks("toml"), blocks("python")
    (folder / "pyproject.toml").write_text(project)
    (folder / "my_plugins.py").write_text(plugins)
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command where `installed` is on Python's path: entry points are seen there as in any site-packages."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "installed")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the order of the page, in one folder; an installation goes beside it, and asks no index.

    Those that need what was installed run in a process of their own.
    """
    words = shlex.split(command)
    if words[0] == "pip":
        offline = ["--no-build-isolation", "--no-index", "--quiet", "--target", "installed"]
        run([sys.executable, "-m", *words, *offline], folder)
        assert (folder / "installed" / "my_plugins.py").exists()
    elif "rings" in command:
        run([sys.executable, "-m", "flatmin.orchestrator", *words[1:]], folder)
    else:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            main()
        signal.signal(signal.SIGTERM, before)
        assert (words[0], ended.value.code) == ("flatmin-sweep", 0)


def test_the_commands_left_what_the_page_says(folder: Path) -> None:
    """After the commands above."""
    rings = Results.open(folder / "results" / "rings")
    models = rings.models()
    assert len(models) == 8
    assert set(models["dataset"]) == {"rings"}
    assert set(models["rings_spread"]) == {0.1}
    assert models[models["label_noise"] == 0]["test_acc"].min() > 0.9, "the rings are learned"
    assert rings.sharpness().groupby("label")["model_id"].nunique().to_dict() == {"lambda_max": 8, "lpf": 8}
    radii = Results.open(folder / "results" / "radii").models()
    assert sorted(radii["seed"]) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (folder / "flat-digits.yaml").read_text().startswith("# yaml-language-server: $schema=study.schema.json")


@pytest.mark.parametrize(
    ("name", "models"), [("radii", 8), ("which-randomness", 5), ("sharpness-over-time", 1), ("wide-images", 30)]
)
def test_studies_plan(name: str, models: int, folder: Path) -> None:
    assert len(read_study(str(folder / f"{name}.yaml")).models) == models


def test_no_study_is_left_out() -> None:
    assert set(STUDIES) == {"radii", "which-randomness", "sharpness-over-time", "wide-images", "my-rings"}


def test_the_twin_plans(folder: Path) -> None:
    (only,) = read_study(str(folder / "wide-images.yaml"), small=True).models
    assert (only.settings["stand_in"], only.settings["width"]) == (True, 4)


def test_python_example(folder: Path) -> None:
    done = run([sys.executable, "-c", blocks("python")[1]], folder)
    assert done.stdout == "4 [2, 2]\n"


def test_the_table_has_every_field() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(StudyFile.model_fields)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
