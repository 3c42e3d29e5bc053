"""docs/clusters/kuberay.yaml against the schema of KubeRay's RayJob; nothing here has met a Kubernetes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

ROOT = Path(__file__).parents[2]
JOB: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "clusters" / "kuberay.yaml").read_text(encoding="utf-8"))
SCHEMA: dict[str, Any] = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text(encoding="utf-8"))


def test_kuberay_accepts_it() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(JOB, SCHEMA)


def _wrong_version(job: dict[str, Any]) -> None:
    job["apiVersion"] = "ray.io/v1alpha1"


def _typing_slip(job: dict[str, Any]) -> None:
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    workers["minReplica"] = workers.pop("minReplicas")


def _number_as_parameter(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _unknown_auth_mode(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "tokn"


def _no_image(job: dict[str, Any]) -> None:
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]


@pytest.mark.parametrize("spoil", [_wrong_version, _typing_slip, _number_as_parameter, _unknown_auth_mode, _no_image])
def test_the_schema_finds_a_mistake(spoil: Callable[[dict[str, Any]], None]) -> None:
    job = copy.deepcopy(JOB)
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def test_rays_autoscaler_reads_it() -> None:
    cluster = {"metadata": {"name": "c", "namespace": "default"}, "spec": JOB["spec"]["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    head, workers = config["available_node_types"]["headgroup"], config["available_node_types"]["gpu"]
    assert (head["resources"]["CPU"], head["resources"].get("GPU", 0)) == (0, 0)
    assert (workers["resources"]["CPU"], workers["resources"]["GPU"]) == (7, 1)
    assert (workers["min_workers"], workers["max_workers"]) == (0, 4)
    assert config["idle_timeout_minutes"] == 5
