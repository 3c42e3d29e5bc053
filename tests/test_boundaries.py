"""Who may import what, and what no file of the repository may contain."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("orchestrator", "trainables", "optimizers", "sharpness", "analysis")
TORCH = {"torch", "torchvision"}


@dataclass(frozen=True)
class Border:
    """What the files of one part may import.

    Attributes:
        inside: The parts of flatmin it may know, beside itself and the modules that all share.
        never: Top-level names of other distributions that it may not import.
    """

    inside: frozenset[str]
    never: frozenset[str]


def border(*inside: str, never: set[str]) -> Border:
    return Border(frozenset(inside), frozenset(never))


BORDERS = {
    "shared": border(never=TORCH | {"ray"}),
    "stack": border(never={"ray"}),
    "optimizers": border("stack", never={"ray"}),
    "sharpness": border("stack", never={"ray"}),
    "analysis": border(never=TORCH | {"ray"}),
    "trainables": border("stack", "optimizers", "sharpness", never=set()),  # ray: in one file, below
    "orchestrator": border("stack", *FOLDERS, never=set()),
    "facade": border("stack", *FOLDERS, never=TORCH | {"ray"}),  # flatmin/__init__.py hands out the verbs
}


def module_of(file: Path) -> str:
    """Return the name by which a file of the package is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "src" else ("flatmin", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """Return which of `BORDERS` a module of flatmin lies in."""
    if module == "flatmin":
        return "facade"
    second = module.split(".")[1]
    return second if second in BORDERS else "shared"


def imports(source: str, module: str, *, package: bool) -> Iterator[str]:
    """Yield every module that a source text imports, wherever in it, relative names resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*above, base] if base else above)
            yield base
            if base == "flatmin" or node.level:
                yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def crossings(source: str, module: str, *, package: bool = False) -> list[str]:
    """Return what a module of flatmin imports that it may not."""
    part = part_of(module)
    allowed = BORDERS[part].inside | {part, "shared", "facade"}
    never = BORDERS[part].never | set(FOLDERS)
    wrong = []
    for name in imports(source, module, package=package):
        top = "torch" if name.startswith("safetensors.torch") else name.split(".")[0]
        if top in never or (top == "flatmin" and part_of(name) not in allowed):
            wrong.append(name)
    return wrong


def package_files() -> list[Path]:
    """Return every Python file of the package, each once, at its real place."""
    shared = [file for file in (ROOT / "src" / "flatmin").glob("*.py")]
    places = [ROOT / "src" / "flatmin" / "stack", *(ROOT / folder for folder in FOLDERS)]
    return sorted(shared + [file for place in places for file in place.rglob("*.py")])


def test_every_part_has_files() -> None:
    found = {part_of(module_of(file)) for file in package_files()}
    assert found == set(BORDERS)


def test_imports_stay_within_their_borders() -> None:
    wrong = {
        str(file.relative_to(ROOT)): found
        for file in package_files()
        if (found := crossings(file.read_text("utf-8"), module_of(file), package=file.stem == "__init__"))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flatmin.results", "import torch"),
        ("flatmin.results", "from flatmin.stack import StackedNetwork"),
        ("flatmin.results", "from flatmin import analysis"),
        ("flatmin.results", "from .orchestrator import study"),
        ("flatmin.results", "import safetensors.torch"),
        ("flatmin.stack.network", "import ray"),
        ("flatmin.stack.network", "from flatmin.trainables.data import order"),
        ("flatmin.optimizers.sam", "def late():\n    from flatmin.sharpness import lpf"),
        ("flatmin.optimizers.sam", "from ..trainables import training"),
        ("flatmin.sharpness.lpf", "import flatmin.optimizers.sgd"),
        ("flatmin.sharpness.lpf", "import optimizers"),
        ("flatmin.analysis.tables", "from torch import Tensor"),
        ("flatmin.analysis.tables", "import importlib\nimportlib.import_module('ray.tune')"),
        ("flatmin.trainables.trainer", "from flatmin.orchestrator import plan"),
        ("flatmin.trainables.trainer", "from flatmin.analysis import tables"),
    ],
)
def test_a_crossing_is_found(module: str, source: str) -> None:
    assert len(crossings(source, module)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flatmin.results", "from flatmin.errors import RequestError"),
        ("flatmin.optimizers.sam", "import torch\nfrom flatmin.stack import Batch\nfrom . import interface"),
        ("flatmin.trainables.trainer", "from flatmin.optimizers.compose import compose"),
        ("flatmin.orchestrator.cli", "import ray\nfrom flatmin import analysis"),
    ],
)
def test_what_is_allowed_is_no_crossing(module: str, source: str) -> None:
    assert crossings(source, module) == []


def test_one_file_of_trainables_knows_ray() -> None:
    knowing = [
        file.name
        for file in package_files()
        if file.is_relative_to(ROOT / "trainables")
        and any(name.split(".")[0] == "ray" for name in imports(file.read_text("utf-8"), "", package=False))
    ]
    assert len(knowing) == 1, knowing


def test_nothing_imports_a_folder_by_its_bare_name() -> None:
    """`import optimizers` works from the repository's root, and loads a second copy of every class."""
    files = [*package_files(), *(file for file in text_files() if file.suffix == ".py")]
    wrong = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imports(file.read_text("utf-8"), "x", package=False)
        if name.split(".")[0] in FOLDERS
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("flatmin", ["ray", "torch"]),
        ("flatmin.plugins", ["ray", "torch"]),
        ("flatmin.results", ["ray", "torch"]),
        ("flatmin.analysis", ["ray", "torch"]),
        ("flatmin.optimizers", ["ray"]),
        ("flatmin.sharpness", ["ray"]),
        ("flatmin.stack", ["ray"]),
    ],
)
def test_importing_loads_no_more_than_it_needs(module: str, unwanted: list[str]) -> None:
    everything = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module({module!r})\n"
        f"if {module!r} != 'flatmin':\n"
        "    for found in pkgutil.walk_packages(getattr(package, '__path__', []), package.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", everything],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT / "tests",
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "flatmin" in loaded
    assert loaded & set(unwanted) == set()


IGNORED = {".git", ".venv", "__pycache__", "build", "dist", "results", "*.egg-info", "*_cache", "*.html"}


def text_files() -> list[Path]:
    """Return the text files that git knows or would add; without git, all but what is never added."""
    listed = b""
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True).stdout
    if listed:
        candidates = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    else:
        candidates = [
            file
            for file in ROOT.rglob("*")
            if not any(fnmatch.fnmatch(part, pattern) for part in file.relative_to(ROOT).parts for pattern in IGNORED)
        ]
    return sorted(
        file for file in candidates if file.is_file() and not file.is_symlink() and b"\0" not in file.read_bytes()
    )


_FOLDERS_OF_ONE_MACHINE = "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers"])
_REGISTRIES = ["py" + "pi.org", "python" + "hosted.org", "ana" + "conda.org", "download.py" + "torch.org"]
ABSOLUTE_PATH = re.compile(
    rf"(?<![\w.~$}})\]*-])/(?:{_FOLDERS_OF_ONE_MACHINE})(?=/[\w.]|[\s'\"`)\],:;]|$)", re.MULTILINE
)
REGISTRY = re.compile("|".join(re.escape(host) for host in _REGISTRIES))


def unwanted_text(text: str) -> list[str]:
    """Return the absolute paths of one machine and the hosts of package registries in a text."""
    return [match.group() for pattern in (ABSOLUTE_PATH, REGISTRY) for match in pattern.finditer(text)]


def test_no_file_names_a_place_of_one_machine() -> None:
    files = text_files()
    assert ROOT / "pyproject.toml" in files
    found = {
        str(file.relative_to(ROOT)): bad
        for file in files
        if (bad := unwanted_text(file.read_text("utf-8", errors="replace")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text", ["cd /{}/main", "'/{}/x'", "file:///{}/me", "--out=/{}/a", "path: /{}", "(/{})", "a\n/{}\nb"]
)
@pytest.mark.parametrize("folder", _FOLDERS_OF_ONE_MACHINE.split("|"))
def test_an_absolute_path_is_found(text: str, folder: str) -> None:
    assert len(unwanted_text(text.format(folder))) == 1


@pytest.mark.parametrize("text", ["~/{}/x", "tmp/{}/x", "$HOME/{}", "{{path}}/{}", "docs/{}.md", "/{}place"])
@pytest.mark.parametrize("folder", _FOLDERS_OF_ONE_MACHINE.split("|"))
def test_other_paths_are_left_alone(text: str, folder: str) -> None:
    assert unwanted_text(text.format(folder)) == []


@pytest.mark.parametrize("host", _REGISTRIES)
def test_a_registry_is_found(host: str) -> None:
    assert unwanted_text(f"https://{host}/simple") == [host]
