"""docs/clusters/ssh.yaml for real: `ray up`, a study, `ray down`, over an SSH server of the test's own.

Head and worker are 127.0.0.2 and 127.0.0.3. On a real cluster each has a machine to itself; here they share one with
whatever else runs on it. So Ray gets a port, a temporary folder and a home of its own, and `ray stop`, which would end
every Ray process of the machine, ends those that the test has started on that node and no other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from flatmin.results import Results

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HEAD, WORKER = "127.0.0.2", "127.0.0.3"  # not 127.0.0.1, which Ray takes for "this machine's address"
SSHD = "/usr/sbin/sshd"
TIMEOUT = 240.0
STUDY = """\
study: on-a-cluster
settings: {dataset: digits, network: mlp, optimizer: sgd, batch_size: 200, epochs: 5}
axes: {width: [2, 3, 4, 5], lr: [0.05, 0.1]}
seeds: 2
measures: [l2_norm]
"""

# `ray` as nodes find it: what it starts is marked with its node; `stop` ends what bears the mark.
RAY = """\
#!{python}
import os, sys, psutil
mark = "{place} " + os.environ["SSH_CONNECTION"].split()[2]
if sys.argv[1:] == ["stop"]:
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLATMIN_TEST_NODE") == mark:
                process.kill()
        except psutil.Error:
            pass
else:
    if sys.argv[1] == "start":
        os.environ["FLATMIN_TEST_NODE"] = mark
    os.execv("{bin}/ray", sys.argv)
"""

# Ray's head names its key `~/ray_bootstrap_key.pem`; ssh asks the system for the home, which is not the test's.
SSH = """\
#!/bin/bash
exec /usr/bin/ssh -p {port} "${{@/#\\~\\//{home}/}}"
"""

SSHD_CONFIG = """\
Port {port}
ListenAddress {head}
ListenAddress {worker}
HostKey {place}/host_key
AuthorizedKeysFile {place}/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
SetEnv HOME={home}
"""

BASHRC = """\
export PATH={place}/bin:{bin}:$PATH PYTHONPATH={root}/src OMP_NUM_THREADS=1
export RAY_AUTH_MODE=disabled RAY_TMPDIR={place}/head RAY_USAGE_STATS_ENABLED=0
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster that can be started.

    Attributes:
        place: A folder that holds all it leaves.
        file: Its YAML.
        address: What `--address` takes.
    """

    place: Path
    file: Path
    address: str

    def ray(self, *arguments: str) -> str:
        """Run a command of Ray's as a user does on his own machine; return what it said."""
        environment = {
            **os.environ,
            "PATH": f"{self.place}/bin:{BIN}:{os.environ['PATH']}",
            "RAY_TMPDIR": f"{self.place}/client",
            "TMPDIR": f"{self.place}/client",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
        }
        command = [str(BIN / "ray"), *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"
        return done.stdout

    def processes(self, node: str = "", name: str = "") -> list[psutil.Process]:
        """Return the processes of Ray on a node, or on all; those of a name, or all."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                marked = process.environ().get("FLATMIN_TEST_NODE", "").startswith(f"{self.place} {node}")
                if marked and process.name().startswith(name):
                    found.append(process)
        return found


def lacking() -> list[str]:
    """Return what this test needs and the machine has not, each with what mends it."""
    tools = [tool for tool in (SSHD, "ssh", "ssh-keygen", "rsync", "bash") if shutil.which(tool) is None]
    packages = "as root: apt-get install -y --no-install-recommends openssh-server openssh-client rsync"
    return [
        *(["run it as root, who may log in to any account: sudo make test-cluster"] if os.geteuid() else []),
        *([f"there is no {', '.join(tools)}; {packages}"] if tools else []),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HEAD, 0))
        return int(probe.getsockname()[1])


def lay_out(place: Path, port: int) -> None:
    """Write all that an SSH server, its keys and a home take."""
    home = place / "home"
    for folder in ("home", "bin", "head", "client"):
        (place / folder).mkdir(mode=0o700)
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / key)], check=True)
    names = {"place": place, "home": home, "port": port, "bin": BIN, "root": ROOT, "python": sys.executable}
    (place / "sshd_config").write_text(SSHD_CONFIG.format(head=HEAD, worker=WORKER, **names))
    (home / ".bashrc").write_text(BASHRC.format(**names))
    for name, text in (("ray", RAY), ("ssh", SSH)):
        (place / "bin" / name).write_text(text.format(**names))
        (place / "bin" / name).chmod(0o755)
    (place / "study.yaml").write_text(STUDY)


def write_yaml(place: Path, port: int) -> Path:
    """Write docs/clusters/ssh.yaml with its lines for users filled in, and with what keeps the test to itself."""
    config = yaml.safe_load((ROOT / "docs" / "clusters" / "ssh.yaml").read_text(encoding="utf-8"))
    config["cluster_name"] = place.name
    config["provider"] = {"type": "local", "head_ip": HEAD, "worker_ips": [WORKER]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(place / "key")}
    config["setup_commands"] = []  # this Python has all installed
    for node, key, old, new in (
        (HEAD, "head_start_ray_commands", "--port=6379", f"--port={port} --temp-dir={place}/ray"),
        (WORKER, "worker_start_ray_commands", "=$RAY_HEAD_IP:6379", f"=$RAY_HEAD_IP:{port}"),
    ):
        start = config[key][-1]
        assert old in start
        config[key][-1] = start.replace(old, f"{new} --node-ip-address={node} --num-cpus=1")
    config["head_start_ray_commands"][-1] += " --include-dashboard=false"
    file = place / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Give a cluster that can be started, and end every process that it leaves."""
    missing = lacking()
    if missing:
        pytest.fail("a cluster cannot be tried here:\n" + "\n".join(f"- {line}" for line in missing), pytrace=False)
    place = Path(tempfile.mkdtemp(prefix="flatmin-", dir="/tmp"))  # short: sockets' names have at most 107 letters
    ssh_port, ray_port = free_port(), free_port()
    lay_out(place, ssh_port)
    Path("/run/sshd").mkdir(exist_ok=True)
    made = Cluster(place, write_yaml(place, ray_port), f"{HEAD}:{ray_port}")
    with open(place / "sshd.log", "w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(place / "sshd_config")], stderr=log)
    try:
        yield made
    finally:
        for process in made.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        server.terminate()
        server.wait()
        shutil.rmtree(place)


def wait_for(what: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < deadline, otherwise
        time.sleep(2)


def test_a_study_runs_on_a_cluster_that_ray_up_starts(cluster: Cluster) -> None:
    file, results = str(cluster.file), cluster.place / "results"
    cluster.ray("up", "-y", "--no-config-cache", file)
    wait_for(lambda: "/2.0 CPU" in cluster.ray("status", "--address", cluster.address), "the head started no worker")
    copied = cluster.place / "home" / "flatmin-sweep"
    assert (copied / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()
    assert (copied / "src" / "flatmin" / "orchestrator" / "cli.py").is_file()

    cluster.ray("rsync-up", file, str(cluster.place / "study.yaml"), "~/study.yaml")
    options = f"--address {cluster.address} --max-failures 3 --models-per-trial 1 --results {results}"
    said = cluster.ray("exec", file, f"python -m flatmin.orchestrator launch ~/study.yaml {options}")
    assert "16 models trained, 0 of 16 remain" in said
    found = Results.open(results)
    assert sorted(found.models()["model_id"]) == sorted(found.plan()["model_id"])
    assert len(found.sharpness()) == found.models()["model_id"].nunique() == 16
    said = cluster.ray("exec", file, f"python -m flatmin.orchestrator launch ~/study.yaml {options}")
    assert "all 16 models are there" in said

    assert cluster.processes(HEAD, "raylet")
    assert cluster.processes(WORKER, "raylet")
    cluster.ray("down", "-y", file)
    assert not cluster.processes(HEAD)
    wait_for(lambda: not cluster.processes(WORKER, "raylet"), "the worker has not ended after its head")
