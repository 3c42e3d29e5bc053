"""The command line: exit codes, where output goes, and lines instead of tracebacks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from tests.orchestrator.conftest import Command, fill

from flatmin.orchestrator.launch import LaunchOptions, launch

Write = Callable[..., Path]


def cli(*arguments: str, cwd: Path | None = None, text: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flatmin.orchestrator", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=text, check=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cli") / "tiny.yaml"
    file.write_text(
        "study: tiny\nsettings: {dataset: digits, network: mlp, optimizer: sgd, lr: 0.05, batch_size: 250, epochs: 3}\n"
        "axes: {width: [2, 4, 8, 16]}\nseeds: 2\nmeasures: [lambda_max]\n"
    )
    return file


@pytest.fixture(scope="module")
def results(study: Path) -> Path:
    launch(str(study), study.parent / "results", options=LaunchOptions(inline=True))
    return study.parent / "results"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("launch digits-duoble-descent --results R", "Did you mean 'digits-double-descent'"),
        ("plan nowhere.yaml", "there is no study file 'nowhere.yaml'"),
        ("plan STUDY lrr=1", "lrr: no plug-in of this study takes it. Did you mean 'lr'?"),
        ("plan STUDY optimizer=samm-sgd", "there is no optimizer 'samm-sgd'. Did you mean 'sam-sgd'?"),
        ("plan STUDY optimizer=sam", "is a gradient rule and needs a base update"),
        ("plan STUDY measures=lpff", "there is no measure 'lpff'. Did you mean 'lpf'?"),
        ("plan STUDY width=-1", "width: -1: should be greater than or equal to 1"),
        ("plan STUDY width=", "an axis needs at least one value"),
        ("plan STUDY --models-per-trial 0", "--models-per-trial 0: should be a number from 1 on, or auto"),
        ("launch STUDY --results s4://b/x", "s3://BUCKET/NAME"),
        ("launch STUDY --results R --time-budget soon", "--time-budget soon: not a time; write 90s, 30m, 2h or 1d"),
        ("launch STUDY --results R --max-failures -1", "greater than or equal to 0"),
        ("launch STUDY --results R --address 127.0.0.1:1", "no Ray cluster there: Connection refused"),
        ("launch digits-sharpness --results RESULTS", "holds the study 'tiny', not 'digits-sharpness'"),
        ("status --results nowhere", "there is no results directory 'nowhere'"),
        ("measure --results RESULTS --measures lpff", "Did you mean 'lpf'?"),
        ("measure --results RESULTS --measures lpf(sigma=-1)", "sigma = -1: should be greater than"),
        ("query --results RESULTS SELEC", "Tables: plan, models, epochs"),
        ("correlate nowhere.csv", "nowhere.csv: no such file"),
        ("correlate RESULTS --target gen_gapp", "gen_gapp"),
        ("report --results nowhere", "there is no results directory 'nowhere'"),
        ("launch STUDY", "--results"),
        ("lunch STUDY", "lunch"),
    ],
)
def test_wrong_requests_exit_with_2_and_say_what_is_possible(
    arguments: str,
    said: str,
    study: Path,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flatmin_sweep: Command,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("STUDY", str(study)).replace("RESULTS", str(results)) for word in arguments.split()]
    done = flatmin_sweep(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == b""


def test_an_older_schema_is_refused(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flatmin_sweep: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"schema": 0, "study": "tiny"}')
    for arguments in (["launch", str(study), "--results", "old"], ["status", "--results", "old"]):
        done = flatmin_sweep(*arguments)
        assert done.returncode == 2
        assert "written with an older schema (0; this version reads 1)" in done.stderr


def test_json_goes_to_stdout_and_holds_the_documented_keys(study: Path, results: Path, flatmin_sweep: Command) -> None:
    plan = json.loads(flatmin_sweep("plan", str(study), "--json").stdout)
    ranges = {"device_seconds_low", "device_seconds_high", "wall_seconds", "calibrated"}
    assert set(plan) == {"study", "models", "trials", "bytes", "device_seconds", *ranges}
    assert set(plan["trials"][0]) == {"trial_id", "model_ids", "settings"}
    assert sum(len(trial["model_ids"]) for trial in plan["trials"]) == len(plan["models"]) == 8
    assert plan["bytes"] > 0
    assert plan["device_seconds"] > 0
    status = json.loads(flatmin_sweep("status", "--results", str(results), "--json").stdout)
    assert {name: status[name] for name in ("planned", "finished", "failed", "remaining", "eta_seconds")} == {
        "planned": 8,
        "finished": 8,
        "failed": 0,
        "remaining": 0,
        "eta_seconds": 0.0,
    }
    studies = json.loads(flatmin_sweep("studies", "--json").stdout)
    assert all(set(row) == {"name", "models", "source", "about"} for row in studies)
    found = json.loads(flatmin_sweep("correlate", str(results), "--json").stdout)
    assert set(found) == {"target", "axes", "n", "dropped", "measures"}
    assert found["measures"]["lambda_max"]["n_configs"] == 4


def test_query_formats(results: Path, flatmin_sweep: Command) -> None:
    sql = "SELECT width, seed FROM models ORDER BY width, seed LIMIT 3"
    expected = [(2, 0), (2, 1), (4, 0)]
    csv = flatmin_sweep("query", "--results", str(results), sql, "--format", "csv").stdout
    assert csv == b"width,seed\n2,0\n2,1\n4,0\n"
    rows = json.loads(flatmin_sweep("query", "--results", str(results), sql, "--format", "json").stdout)
    assert [(row["width"], row["seed"]) for row in rows] == expected
    raw = subprocess.run(
        [sys.executable, "-m", "flatmin.orchestrator", "query", "--results", str(results), sql, "--format", "parquet"],
        capture_output=True,
        check=True,
    ).stdout
    assert list(pq.read_table(BytesIO(raw)).to_pandas().itertuples(index=False, name=None)) == expected


def test_a_truncated_file_is_a_warning_to_readers(study: Path, tmp_path: Path) -> None:
    launch(str(study), tmp_path / "r", options=LaunchOptions(inline=True))
    file = next((tmp_path / "r" / "models").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-10])
    done = cli("query", "--results", str(tmp_path / "r"), "SELECT count(*) AS n FROM models", "--format", "csv")
    assert done.returncode == 0
    assert done.stdout == "n\n6\n"
    assert f"warning: {file} cannot be read" in done.stderr
    assert done.stderr.count("cannot be read") == 1


def test_correlate_works_on_anybodys_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flatmin_sweep: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame({"depth": [1, 1, 2, 2, 3, 3, 4, 4], "seed": [0, 1] * 4, "gap": range(8), "flat": range(8)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    done = flatmin_sweep("correlate", "t.csv", "--target", "gap", "--measures", "flat", "--axes", "depth", "--json")
    assert json.loads(done.stdout)["measures"]["flat"]["tau"] == 1.0


def test_a_folder_with_a_module_of_our_folders_names_does_no_harm(study: Path, tmp_path: Path) -> None:
    """Ray workers put the driver's folder on their path; an `analysis.py` there must shadow nothing."""
    for name in ("analysis", "optimizers", "trainables", "sharpness", "orchestrator"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
    done = cli("launch", str(study), "width=2", "--results", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 models trained, 0 of 2 remain" in done.stderr
    assert cli("report", "--results", "r", cwd=tmp_path).returncode == 0
    assert (tmp_path / "report.html").exists()


def test_help_lists_the_settings_without_torch() -> None:
    done = cli("launch", "--help")
    assert "rho  float >= 0" in done.stdout
    code = (
        "import sys; sys.argv = ['x', 'plan', '--help']\n"
        "from flatmin.orchestrator.cli import main\n"
        "try: main()\n"
        "except SystemExit: print({'torch', 'ray'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("set()")


def test_doctor_names_every_check(flatmin_sweep: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatmin.orchestrator.doctor._ray", lambda: "started where the README's commands are run")
    done = flatmin_sweep("doctor", "--json")
    checks = json.loads(done.stdout)
    assert all(set(check) == {"check", "ok", "found", "mend"} for check in checks)
    assert {"python", "torch", "ray starts", "data: digits", "disk"} <= {check["check"] for check in checks}
    broken = [check for check in checks if not check["ok"]]
    assert not broken
    assert done.returncode == 0


def test_time_budget_ends_a_ray_launch_with_3_and_the_next_goes_on(
    study: Path, tmp_path: Path, flatmin_sweep: Command
) -> None:
    arguments = ["launch", str(study), "epochs=400", "width=8,16", "--results", str(tmp_path / "r")]
    done = cli(*arguments, "--time-budget", "4s")
    assert done.returncode == 3, done.stderr
    assert "the time budget is spent" in done.stderr
    resumed = flatmin_sweep(*arguments, "--inline")
    assert resumed.returncode == 0, resumed.stderr


def test_python_warnings_do_not_reach_the_user(study: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "flatmin.orchestrator",
            "launch",
            str(study),
            "--inline",
            "--results",
            str(tmp_path / "r"),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert done.stderr.strip() == "8 models trained, 0 of 8 remain"


def test_compact_says_what_it_did(flatmin_sweep: Command, tmp_path: Path) -> None:
    results = fill(tmp_path / "r")
    done = flatmin_sweep("compact", "--results", str(results.path), "--json")
    tables = {one["table"]: (one["before"], one["after"]) for one in json.loads(done.stdout)}
    assert tables == {"models": (3, 1), "epochs": (3, 1), "sharpness": (3, 1), "spectra": (0, 0)}
    assert flatmin_sweep("compact", "--results", str(tmp_path / "nowhere")).returncode == 2


def test_what_the_system_does_not_give_is_told_in_a_line(results: Path, tmp_path: Path, flatmin_sweep: Command) -> None:
    copy = shutil.copytree(results, tmp_path / "r")
    loop = copy / "models" / "loop.parquet"
    loop.symlink_to(loop.name)
    for arguments in (["status"], ["query", "SELECT * FROM models"], ["compact"]):
        done = flatmin_sweep(*arguments, "--results", str(copy))
        assert (done.returncode, done.stderr) == (2, f"'{loop}': Too many levels of symbolic links\n")


def test_measuring_ends_at_an_interrupt_as_launching_does(
    results: Path, flatmin_sweep: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("flatmin.orchestrator.launch.measure", interrupted)
    done = flatmin_sweep("measure", "--results", str(results), "--measures", "l2_norm")
    assert done.returncode == 130
    assert "run the same command to go on" in done.stderr
