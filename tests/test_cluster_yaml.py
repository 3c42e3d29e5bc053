"""The cluster files: Ray accepts them, they avoid the traps that Ray does not check, and nodes get a whole package."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
AWS, GCP, SSH = ROOT / "cluster.yaml", ROOT / "docs" / "clusters" / "gcp.yaml", ROOT / "docs" / "clusters" / "ssh.yaml"
FILES = [AWS, GCP, SSH]
CLOUDS = [AWS, GCP]
TYPED_BY_USERS = [*FILES, ROOT / "docs" / "clusters.md", *(ROOT / "docs" / "clusters").iterdir()]

Config = dict[str, Any]


def load(file: Path) -> Config:
    loaded: Config = yaml.safe_load(file.read_text(encoding="utf-8"))
    return loaded


def problems(config: Config) -> list[str]:
    """Return which of the rules for all clusters a file breaks."""
    setup = "\n".join(config["setup_commands"])
    head_start, worker_start = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    rules = {
        "setup pins one version of ray": len(re.findall(r"ray\[default,tune\]==\d+\.\d+\.\d+\b", setup)) == 1,
        "setup says RAY_AUTH_MODE": re.search(r"\bRAY_AUTH_MODE=(disabled|token)\b", setup) is not None,
        "setup says where data lie": "FLATMIN_DATA=" in setup,
        "both starts stop an older Ray first": head_start[0] == worker_start[0] == "ray stop",
        "both starts raise the limit of open files": all(
            re.match(r"ulimit -n \d{5,};.* ray start ", start[-1]) for start in (head_start, worker_start)
        ),
        "the head starts the autoscaler": "--autoscaling-config=~/ray_bootstrap_config.yaml" in head_start[-1],
        "the autoscaler is v1": " RAY_enable_autoscaler_v2=0 " in head_start[-1],
        "the dashboard is for the head alone": "--dashboard-host=127.0.0.1" in head_start[-1],
        "workers join the head": "--address=$RAY_HEAD_IP:6379" in worker_start[-1],
    }
    return [rule for rule, holds in rules.items() if not holds]


def cloud_problems(config: Config) -> list[str]:
    """Return which of the rules for rented machines a file breaks."""
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    rules = {
        "the head runs no trial": head["resources"].get("CPU") == 0
        and "--num-cpus=0 --num-gpus=0" in config["head_start_ray_commands"][-1],
        "the head is on demand": not is_spot(head),
        "workers are on the spot market first": is_spot(types[max(types)]),
        "no worker runs without a trial": all(worker["min_workers"] == 0 for worker in types.values()),
        "workers are bounded": all(worker["max_workers"] <= config["max_workers"] for worker in types.values()),
        "idle workers go": 0 < config["idle_timeout_minutes"] <= 15,
        "one image, so one Python": len({image(node) for node in (head, *types.values())}) == 1,
        "machines end with the cluster": config["provider"]["cache_stopped_nodes"] is False,
    }
    return [rule for rule, holds in rules.items() if not holds]


def is_spot(node: Config) -> bool:
    config = node["node_config"]
    aws = config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return aws or any(item.get("provisioningModel") == "SPOT" for item in config.get("scheduling", []))


def image(node: Config) -> str:
    config = node["node_config"]
    return str(config.get("ImageId") or config["disks"][0]["initializeParams"]["sourceImage"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ray_accepts_it(file: Path) -> None:
    validate_config(prepare_config(load(file)))


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.name)
def test_ray_check_finds_a_mistake(file: Path) -> None:
    config = load(file)
    config["head_node_type"] = "haed"
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_our_rules_hold(file: Path) -> None:
    assert problems(load(file)) == []


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.name)
def test_our_rules_for_clouds_hold(file: Path) -> None:
    assert cloud_problems(load(file)) == []


def test_on_demand_is_second_choice_on_aws() -> None:
    types = load(AWS)["available_node_types"]
    spot, full = types["spot"], types["on-demand"]
    assert sorted(types)[-1] == "spot", "of equal types Ray takes the last in the alphabet"
    assert not is_spot(full)
    assert {**spot["node_config"], "InstanceMarketOptions": None} == {
        **full["node_config"],
        "InstanceMarketOptions": None,
    }
    assert full["max_workers"] == spot["max_workers"]


def _edit(key: str, old: str, new: str) -> Callable[[Config], None]:
    def spoil(config: Config) -> None:
        config[key] = [line.replace(old, new) for line in config[key]]

    return spoil


def _spot_head(config: Config) -> None:
    config["available_node_types"]["head"]["node_config"]["InstanceMarketOptions"] = {"MarketType": "spot"}


def _no_spot(config: Config) -> None:
    del config["available_node_types"]["spot"]["node_config"]["InstanceMarketOptions"]


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (_edit("setup_commands", "==2.60.0", ""), "setup pins one version of ray"),
        (_edit("setup_commands", "RAY_AUTH_MODE=disabled", ""), "setup says RAY_AUTH_MODE"),
        (_edit("head_start_ray_commands", "--autoscaling-config", "--config"), "the head starts the autoscaler"),
        (_edit("head_start_ray_commands", "RAY_enable_autoscaler_v2=0 ", ""), "the autoscaler is v1"),
        (_edit("worker_start_ray_commands", "$RAY_HEAD_IP", "10.0.0.1"), "workers join the head"),
        (_spot_head, "the head is on demand"),
        (_no_spot, "workers are on the spot market first"),
    ],
)
def test_our_rules_find_a_mistake(spoil: Callable[[Config], None], rule: str) -> None:
    spoiled = copy.deepcopy(load(AWS))
    spoil(spoiled)
    assert problems(spoiled) + cloud_problems(spoiled) == [rule]


def test_every_ray_version_named_is_the_same_and_ours() -> None:
    texts = [file.read_text(encoding="utf-8") for file in TYPED_BY_USERS]
    named = {
        version for text in texts for version in re.findall(r"(?:ray\[[a-z,]+\]==|rayproject/ray:)([\d.]+\d)", text)
    }
    assert len(named) == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (ray,) = [need for need in map(Requirement, project["dependencies"]) if need.name == "ray"]
    assert ray.specifier.contains(named.pop())


def test_all_clusters_get_the_same_files() -> None:
    assert load(AWS)["file_mounts"] == load(GCP)["file_mounts"] == load(SSH)["file_mounts"]
    assert load(AWS)["rsync_exclude"] == load(GCP)["rsync_exclude"] == load(SSH)["rsync_exclude"]


def test_what_nodes_get_is_the_whole_package(tmp_path: Path) -> None:
    """Build from what `ray up` copies, and find every file of the package in the wheel."""
    excluded = shutil.ignore_patterns(*load(AWS)["rsync_exclude"])
    for there, here in load(AWS)["file_mounts"].items():
        target = tmp_path / there.removeprefix("~/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / here).is_dir():
            shutil.copytree(ROOT / here, target, symlinks=True, ignore=excluded)
        else:
            shutil.copy(ROOT / here, target)
    source = tmp_path / "flatmin-sweep"
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    command = [sys.executable, "-m", "pip", "wheel", *options]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    package = ROOT / "src" / "flatmin"
    ours = {
        str(file.relative_to(ROOT / "src"))
        for folder in (package, *(entry for entry in package.iterdir() if entry.is_symlink()))
        for file in folder.rglob("*.*")
        if file.is_file() and file.suffix in {".py", ".yaml", ".css", ".csv", ".js", ".typed"}
    }
    assert len(ours) > 100
    assert ours <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_environment_of_nodes_is_written_once(file: Path, tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text("export OWN=1\n")
    lines = [line for line in load(file)["setup_commands"] if "~/.bashrc" in line]
    assert len(lines) == 2
    for line in lines * 2:  # `ray up` runs them again after each change
        known = "cloud-init() { echo eu-west-1; }; "
        subprocess.run(["bash", "-c", known + line], check=True, env={**os.environ, "HOME": str(tmp_path)})
    written = (tmp_path / ".bashrc").read_text().splitlines()
    assert written[0] == "export OWN=1"
    assert len(written) == len(set(written))
    shown = subprocess.run(
        ["bash", "-c", 'source ~/.bashrc; echo "$RAY_AUTH_MODE,$FLATMIN_DATA,$AWS_REGION,${PATH%%:*}"'],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    venv = "flatmin-venv" if file == SSH else "venv"
    assert shown == f"disabled,{tmp_path}/data,{'eu-west-1' if file == AWS else ''},{tmp_path}/{venv}/bin"


def test_the_documentation_names_each_file_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\((?!https:)([^)]+)\)", text)]
    assert all((ROOT / "docs" / target).exists() for target in targets)
    files = {f"clusters/{file.name}" for file in (ROOT / "docs" / "clusters").iterdir() if file.is_file()}
    assert files <= set(targets)
