"""cluster.yaml: Ray accepts it, and it avoids the traps that Ray does not check."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")

Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    loaded: Config = yaml.safe_load(TEXT)
    return loaded


def problems(config: Config) -> list[str]:
    """Return which of our own rules a cluster file breaks."""
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    setup = "\n".join(config["setup_commands"])
    head_start, worker_start = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    nodes = [head, *types.values()]
    rules = {
        "setup pins one version of ray": len(re.findall(r"ray\[default,tune\]==\d+\.\d+\.\d+\b", setup)) == 1,
        "setup says RAY_AUTH_MODE": re.search(r"export RAY_AUTH_MODE=(disabled|token)\b", setup) is not None,
        "both starts stop an older Ray first": head_start[0] == worker_start[0] == "ray stop",
        "both starts raise the limit of open files": all(
            re.match(r"ulimit -n \d{5,}; ray start ", start[-1]) for start in (head_start, worker_start)
        ),
        "the head starts the autoscaler": "--autoscaling-config=~/ray_bootstrap_config.yaml" in head_start[-1],
        "workers join the head": "--address=$RAY_HEAD_IP:6379" in worker_start[-1],
        "the head runs no trial": head["resources"].get("CPU") == 0 and "--num-cpus=0" in head_start[-1],
        "the head is on demand": "InstanceMarketOptions" not in head["node_config"],
        "workers are spot": all(
            worker["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
            for worker in types.values()
        ),
        "no worker runs without a trial": all(worker["min_workers"] == 0 for worker in types.values()),
        "workers are bounded": all(0 < worker["max_workers"] <= config["max_workers"] for worker in types.values()),
        "one image, so one Python": len({node["node_config"]["ImageId"] for node in nodes}) == 1,
        "machines end with the cluster": config["provider"]["cache_stopped_nodes"] is False,
    }
    return [rule for rule, holds in rules.items() if not holds]


def test_ray_accepts_it(config: Config) -> None:
    validate_config(prepare_config(config))


def test_ray_check_finds_a_mistake(config: Config) -> None:
    config["head_node_type"] = "haed"
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(config))


def test_our_rules_hold(config: Config) -> None:
    assert problems(config) == []


def _unpin(config: Config) -> None:
    config["setup_commands"] = [line.replace("==2.60.0", "") for line in config["setup_commands"]]


def _forget_auth_mode(config: Config) -> None:
    config["setup_commands"] = [line for line in config["setup_commands"] if "RAY_AUTH_MODE" not in line]


def _spot_head(config: Config) -> None:
    config["available_node_types"]["head"]["node_config"]["InstanceMarketOptions"] = {"MarketType": "spot"}


def _on_demand_worker(config: Config) -> None:
    del config["available_node_types"]["worker"]["node_config"]["InstanceMarketOptions"]


def _no_autoscaler(config: Config) -> None:
    config["head_start_ray_commands"][-1] = "ulimit -n 65536; ray start --head --num-cpus=0"


def _fixed_head_address(config: Config) -> None:
    config["worker_start_ray_commands"][-1] = "ulimit -n 65536; ray start --address=10.0.0.1:6379"


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (_unpin, "setup pins one version of ray"),
        (_forget_auth_mode, "setup says RAY_AUTH_MODE"),
        (_spot_head, "the head is on demand"),
        (_on_demand_worker, "workers are spot"),
        (_no_autoscaler, "the head starts the autoscaler"),
        (_fixed_head_address, "workers join the head"),
    ],
)
def test_our_rules_find_a_mistake(config: Config, spoil: Callable[[Config], None], rule: str) -> None:
    spoiled = copy.deepcopy(config)
    spoil(spoiled)
    assert problems(spoiled) == [rule]


def test_every_ray_version_named_is_the_same_and_ours() -> None:
    named = set(re.findall(r"ray\[[a-z,]+\]==([\d.]+)", TEXT))
    assert len(named) == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (ray,) = [need for need in map(Requirement, project["dependencies"]) if need.name == "ray"]
    assert ray.specifier.contains(named.pop())
