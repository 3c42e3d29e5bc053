"""docs/clusters/slurm.sh with stand-ins for Slurm's commands: quickly with one for Ray too, and once with Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flatmin.lease import EXPIRY_SECONDS
from flatmin.results import Results

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "clusters" / "slurm.sh"
BIN = Path(sys.executable).parent
JOB = "4242"

# `srun OPTIONS COMMAND`: the command, on this machine. Slurm ends a step with its `srun`, and so does `exec`.
SRUN = """\
echo "srun $*" >> {calls}
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = """\
echo "scontrol $*" >> {calls}
if [[ $1 == show ]]; then printf '%s\\n' {nodes}; fi
"""
FAKE_RAY = """\
echo "ray $*" >> {calls}
if [[ $1 == start ]]; then {start}; exec /bin/sleep 60; fi
"""
FAKE_SWEEP = """\
until (($(grep -c ^srun {calls}) == {count})); do /bin/sleep 0.05; done  # steps start in the background
echo "flatmin-sweep $*" >> {calls}
exit {code}
"""


@dataclass(frozen=True)
class Slurm:
    """A machine that takes itself for the first node of a job.

    Attributes:
        place: A folder that holds its home and its commands.
        nodes: The names of the job's nodes.
    """

    place: Path
    nodes: tuple[str, ...] = ("n1", "n2")

    def has(self, name: str, text: str, **names: object) -> None:
        """Give the machine a command."""
        folder = self.place / "home" / "flatmin-venv" / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        filled = text.format(calls=self.place / "calls", nodes=" ".join(self.nodes), count=len(self.nodes), **names)
        (folder / name).write_text(f"#!/bin/bash\n{filled}")
        (folder / name).chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the job; return how it ended and what it said."""
        self.has("srun", SRUN)
        self.has("scontrol", SCONTROL)
        slurm = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "1"}
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env={**os.environ, "HOME": str(self.place / "home"), **slurm, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    def calls(self, start: str) -> list[str]:
        """Return the calls that begin so."""
        return [line for line in (self.place / "calls").read_text().splitlines() if line.startswith(start)]


def faked(place: Path, *, code: int = 0, start: str = "true", nodes: tuple[str, ...] = ("n1", "n2")) -> Slurm:
    slurm = Slurm(place, nodes)
    slurm.has("ray", FAKE_RAY, start=start)
    slurm.has("flatmin-sweep", FAKE_SWEEP, code=code)
    return slurm


def test_bash_reads_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_nodes_become_a_cluster_that_launches(tmp_path: Path) -> None:
    slurm = faked(tmp_path)
    done = slurm.run("digits-sharpness", "/shared/r", "width=4,8", "note=a b", SLURM_GPUS_ON_NODE="2")
    assert done.returncode == 0, done.stdout
    # both are started in the background: on a busy machine either may note its call first
    head, worker = sorted(slurm.calls("srun"), key=lambda call: "--head" not in call)
    assert "--nodes=1 --nodelist=n1 ray start --head" in head
    assert "--num-cpus=1 --num-gpus=2 --block" in head
    assert "--nodes=1 --exclude=n1 ray start --address=" in worker
    address = worker.split("--address=")[1].split()[0]
    assert address.endswith(":24242")
    (launch,) = slurm.calls("flatmin-sweep")
    assert launch.startswith(f"flatmin-sweep launch digits-sharpness --results /shared/r --address {address} ")
    assert "--gpus-per-trial 1 " in launch
    assert launch.endswith(" width=4,8 note=a b")
    assert not slurm.calls("ray stop"), "it would end the Ray of other jobs on the node"
    assert not slurm.calls("scontrol requeue")


def test_one_node_and_no_gpu(tmp_path: Path) -> None:
    slurm = faked(tmp_path, nodes=("n1",))
    assert slurm.run("s", "/shared/r").returncode == 0
    assert len(slurm.calls("srun")) == 1
    assert "--gpus-per-trial 0 " in slurm.calls("flatmin-sweep")[0]


@pytest.mark.parametrize(("code", "again"), [(0, []), (1, []), (2, []), (3, [f"scontrol requeue {JOB}"])])
def test_only_spent_time_goes_to_the_queue_again(tmp_path: Path, code: int, again: list[str]) -> None:
    slurm = faked(tmp_path, code=code)
    assert slurm.run("s", "/shared/r").returncode == code
    assert slurm.calls("scontrol requeue") == again


def test_a_job_that_was_taken_back_waits_for_the_lease(tmp_path: Path) -> None:
    slurm = faked(tmp_path)
    slurm.has("sleep", 'echo "sleep $*" >> {calls}\n')
    path = f"{tmp_path}/home/flatmin-venv/bin:{os.environ['PATH']}"
    assert slurm.run("s", "/shared/r", PATH=path, SLURM_RESTART_COUNT="1").returncode == 0
    assert slurm.calls("")[0] == f"sleep {EXPIRY_SECONDS:.0f}"
    (tmp_path / "calls").unlink()
    assert slurm.run("s", "/shared/r", PATH=path).returncode == 0
    assert slurm.calls("")[0].startswith("ray ")


def test_a_head_that_does_not_start_ends_the_job(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    slurm.has("ray", 'echo "ray $*" >> {calls}\nif [[ $1 != get-auth-token ]]; then exit 1; fi')
    slurm.has("flatmin-sweep", FAKE_SWEEP, code=0)
    assert slurm.run("s", "/shared/r").returncode == 1
    assert not slurm.calls("flatmin-sweep")


def test_a_forgotten_argument_is_told(tmp_path: Path) -> None:
    done = faked(tmp_path).run("digits-sharpness")
    assert done.returncode != 0
    assert "sbatch slurm.sh STUDY RESULTS" in done.stdout


@pytest.mark.slow
def test_a_study_runs_in_a_job(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    slurm.has("ray", 'exec {bin}/ray "$@"', bin=BIN)
    slurm.has("flatmin-sweep", 'exec {bin}/python -m flatmin.orchestrator "$@"', bin=BIN)
    slurm.has("hostname", "echo 127.0.0.2")
    results = tmp_path / "results"
    arguments = ("digits-double-descent", str(results), "width=2,3", "label_noise=0", "seeds=2", "epochs=3")
    done = slurm.run(*arguments, PYTHONPATH=str(ROOT / "src"), OMP_NUM_THREADS="1", SLURM_JOB_ID=str(os.getpid()))
    assert done.returncode == 0, done.stdout[-4000:]
    found = Results.open(results)
    assert sorted(found.models()["model_id"]) == sorted(found.plan()["model_id"])
    assert len(found.plan()) == 4
