"""The README: every command in it is run, and what it names exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from flatmin.orchestrator.study import builtin_names, read_study
from flatmin.reference import markdown
from flatmin.tables import TABLES, fixed_columns

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("flatmin-sweep")]
WITHOUT_RAY = [
    "flatmin-sweep launch my-study.yaml --results results/mine",
    "flatmin-sweep launch frequency-sinusoids --small --results results/sinusoids",
]
MAKE = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines() if line.startswith("make")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the README's study."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my-study.yaml").write_text(blocks("yaml")[0])
    return folder


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a Ray cluster of the test's own, and return its address."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        shlex.split(command),
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("command", [command for command in COMMANDS if "ADDRESS" not in command])
def test_command(command: str, folder: Path) -> None:
    """Commands run in the order of the README, in one folder, as a reader types them; Ray need not start for each."""
    done = run(f"{command} --inline" if command in WITHOUT_RAY else command, folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout or "launch" in command or "measure" in command
    if " -o " in command:
        assert (folder / shlex.split(command)[-1]).stat().st_size > 1_000_000


def test_what_runs_without_ray_is_in_the_readme() -> None:
    assert set(WITHOUT_RAY) < set(COMMANDS)


def test_the_cluster_command_joins_a_running_cluster(folder: Path, address: str) -> None:
    (command,) = [command for command in COMMANDS if "ADDRESS" in command]
    done = run(command.replace("ADDRESS", address), folder)
    assert done.returncode == 0, done.stderr
    assert "2 models trained, 0 of 2 remain" in done.stderr


def test_a_cluster_may_grow_so_a_shortage_is_said_and_waited_for(folder: Path, address: str) -> None:
    command = f"flatmin-sweep launch digits-label-noise --address {address} --gpus-per-trial 0.5 --results results/gpu"
    done = run(f"{command} --time-budget 3s", folder)
    assert done.returncode == 3, done.stderr
    assert "--gpus-per-trial 0.5: the cluster has 0 GPUs now; trials wait until it has grown" in done.stderr


def test_the_grown_grid_trains_the_new_models_alone(folder: Path) -> None:
    """What the README says of its second launch; after the commands above, so nothing is left to train."""
    done = run("flatmin-sweep launch my-study.yaml --results results/mine seeds=4 --inline", folder)
    assert "all 16 models are there; nothing was trained" in done.stderr


def test_python_example(folder: Path) -> None:
    (example, _, _) = blocks("python")
    (folder / "example.py").write_text(example)
    done = run("python example.py", folder)
    assert done.returncode == 0, done.stderr
    assert "width" in done.stdout


def test_optimizer_example_trains(folder: Path, tmp_path: Path) -> None:
    """The README's new optimizer, put into a copy of the package as the README says, trains and composes with SAM."""
    import shutil

    (_, _, example) = blocks("python")
    copy = tmp_path / "src" / "flatmin"
    shutil.copytree(ROOT / "src" / "flatmin", copy, symlinks=False)
    (copy / "optimizers" / "signsgd.py").write_text(example)
    code = (
        "import flatmin, pandas; flatmin.launch('my-study.yaml', 'results/sign',"
        "['optimizer=signsgd,sam-signsgd', 'lr=0.001', 'seeds=1', 'measures=lambda_max'],"
        "flatmin.LaunchOptions(inline=True));"
        "print(flatmin.Results.open('results/sign').models().set_index('optimizer')['train_acc'].min() > 0.7)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_loop_example_trains_and_measures() -> None:
    (_, example, _) = blocks("python")
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"lpf|lambda_max|hessian_trace\(metric=identity\)", done.stdout)


def test_plug_in_examples_for_contributors_work_together(tmp_path: Path) -> None:
    """Each file of CONTRIBUTING.md, put where it says, makes a study of new plug-ins alone."""
    import shutil

    copy = tmp_path / "src" / "flatmin"
    shutil.copytree(ROOT / "src" / "flatmin", copy, symlinks=False)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = {}
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        (name,) = re.findall(r"^def (\w+)\(", code, re.MULTILINE)
        files[next(path for path in re.findall(r"`([\w/]+\.py)`", section) if path.endswith(f"/{name}.py"))] = code
    assert len(files) == 4
    for path, code in files.items():
        assert not (copy / path).exists(), f"{path} is taken"
        (copy / path).write_text(code)
    (tmp_path / "study.yaml").write_text(
        "study: new\nsettings: {dataset: wine, network: linear, optimizer: sam-signsgd, epochs: 5, batch_size: 20}\n"
        "seeds: 2\nmeasures: [gradient_max]\n"
    )
    code = (
        "import flatmin; flatmin.launch('study.yaml', 'r', [], flatmin.LaunchOptions(inline=True));"
        "print(flatmin.Results.open('r').sharpness()['converged'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[True, True]", done.stderr


@pytest.mark.parametrize("command", MAKE, ids=" ".join)
def test_make_targets_exist(command: list[str]) -> None:
    """`make test` runs this very test; `make quickstart` is run in a fresh clone by `make test-slow`."""
    done = subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_make_quickstart_in_a_fresh_clone(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    done = subprocess.run(
        ["make", "quickstart", f"PYTHON={sys.executable}"],
        cwd=tmp_path / "clone",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = tmp_path / "clone" / "results" / "digits-double-descent" / "report.html"
    assert report.as_uri() in done.stdout
    assert "Test error peaks at width" in report.read_text()


def test_the_table_of_studies_is_complete() -> None:
    listed = dict(re.findall(r"^\| `([\w-]+)` \| (\d+) \|", README, re.MULTILINE))
    assert {name: len(read_study(name).models) for name in builtin_names()} == {n: int(c) for n, c in listed.items()}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, heading = target.partition("#")
        assert target.startswith("https://") or (ROOT / file).exists(), target
        headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.M) if heading else []
        assert not heading or heading in {
            re.sub(r"[^a-z0-9 -]", "", text.lower()).replace(" ", "-") for text in headings
        }


def test_docs_name_every_column() -> None:
    text = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    for table in TABLES:
        (row,) = re.findall(rf"^\| `{table}` \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
        assert [name for name in row.strip().split(", ") if name != "every setting"] == fixed_columns(table)


def test_docs_of_settings_are_what_the_signatures_say() -> None:
    """After changing a plug-in: `python -m flatmin.reference > docs/settings.md`."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == markdown()
