"""cluster.yaml and the preparation of an account, carried out by Ray's own AWS code against moto's mocked AWS."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3  # type: ignore[import-untyped]
import botocore.exceptions  # type: ignore[import-untyped]
import pytest
import yaml
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.aws.utils import client_cache, resource_cache
from ray.autoscaler._private.event_summarizer import EventSummarizer
from ray.autoscaler._private.node_launcher import BaseNodeLauncher
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler
from ray.autoscaler._private.util import ConcurrentCounter, prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.core.generated.common_pb2 import Bundle, PlacementStrategy
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

ROOT = Path(__file__).parents[2]
REGION = "eu-west-1"
BUCKET = "flatmin-sweep-123456789012-eu-west-1"
# What EC2 says of the machines of cluster.yaml; of moto Ray would have to ask all types there are, for ten seconds.
MACHINES = [
    {"InstanceType": "m6i.xlarge", "VCpuInfo": {"DefaultVCpus": 4}, "MemoryInfo": {"SizeInMiB": 16384}},
    {
        "InstanceType": "g5.2xlarge",
        "VCpuInfo": {"DefaultVCpus": 8},
        "MemoryInfo": {"SizeInMiB": 32768},
        "GpuInfo": {"Gpus": [{"Name": "A10G", "Manufacturer": "NVIDIA", "Count": 1}]},
    },
]
# What Ray Tune asks for: a placement group per trial.
TRIAL = PlacementGroupTableData(
    state=PlacementGroupTableData.PENDING,
    strategy=PlacementStrategy.PACK,
    bundles=[Bundle(unit_resources={"CPU": 1.0, "GPU": 1.0})],
)
RAYS_OWN = "ray.autoscaler._private.resource_demand_scheduler._default_utilization_scorer"

Config = dict[str, Any]


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Return the script that prepares an account, within a mocked AWS in which it has run."""
    with mock_aws(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes its key there
        patch.setenv("AWS_ACCESS_KEY_ID", "us")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        spec = importlib.util.spec_from_file_location("aws_account", ROOT / "docs" / "clusters" / "aws_account.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.prepare(REGION) == BUCKET
        yield module
        resource_cache.cache_clear()
        client_cache.cache_clear()


@pytest.fixture(scope="module")
def config(account: ModuleType) -> Config:
    """Return cluster.yaml as `ray up` has it when it has asked AWS for all that is left open."""

    loaded = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    loaded["provider"]["region"] = REGION
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.autoscaler._private.aws.node_provider.list_ec2_instances", lambda *_: MACHINES)
        full = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(loaded))
    validate_config(full)
    made: Config = bootstrap_aws(full)
    return made


@pytest.fixture
def provider(config: Config) -> Iterator[Any]:
    made = AWSNodeProvider(config["provider"], config["cluster_name"])
    yield made
    for node in made.non_terminated_nodes({}):
        made.terminate_node(node)


def start(provider: Any, config: Config, node_type: str) -> Any:
    """Start a node of a type as Ray does; return what EC2 then says of it."""
    node_config = {**config["available_node_types"][node_type]["node_config"], **config["head_node"]}
    (node,) = provider.create_node(node_config, {"ray-node-name": "n", "ray-user-node-type": node_type}, 1)
    (found,) = boto3.client("ec2", REGION).describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"]
    return found


def test_preparing_twice_changes_nothing(account: ModuleType) -> None:
    assert account.prepare(REGION) == BUCKET
    iam = boto3.client("iam")
    for name in (account.HEAD, account.WORKER):
        (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        assert role["RoleName"] == name
    s3 = boto3.client("s3", REGION)
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == [BUCKET]
    assert all(s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"].values())


@pytest.mark.parametrize(
    ("node_type", "profile", "lifecycle"),
    [("head", "head", None), ("spot", "worker", "spot"), ("on-demand", "worker", None)],
)
def test_ray_starts_each_kind_of_node(
    provider: Any, config: Config, node_type: str, profile: str, lifecycle: str | None
) -> None:
    node = start(provider, config, node_type)
    assert node["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/flatmin-sweep-{profile}")
    assert node.get("InstanceLifecycle") == lifecycle
    # Ray neither looks the image up nor puts its own default in its place: EC2 gets the parameter's name.
    assert node["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/")
    assert node["KeyName"] == f"ray-autoscaler_{REGION}"


def test_resources_are_those_of_the_machines(config: Config) -> None:
    types = config["available_node_types"]
    assert types["spot"]["resources"] == types["on-demand"]["resources"]
    assert (types["spot"]["resources"]["GPU"], types["spot"]["resources"]["CPU"]) == (1, 8)


def as_role(name: str) -> boto3.Session:
    """Return a session with the rights of a role, as a machine that was handed it has them."""
    given = boto3.client("sts", REGION).assume_role(
        RoleArn=f"arn:aws:iam::123456789012:role/{name}", RoleSessionName="machine"
    )["Credentials"]
    return boto3.Session(given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"], region_name=REGION)


def test_what_the_roles_may_do(account: ModuleType) -> None:
    head, worker = as_role(account.HEAD), as_role(account.WORKER)
    boto3.client("s3", REGION).create_bucket(
        Bucket="somebody-elses", CreateBucketConfiguration={"LocationConstraint": REGION}
    )
    checked = set_initial_no_auth_action_count(0)

    def refused(call: Any, **arguments: Any) -> bool:
        try:
            call(**arguments)
        except botocore.exceptions.ClientError as error:
            return error.response["Error"]["Code"] in {"AccessDenied", "UnauthorizedOperation"}
        return False

    @checked
    def rights() -> None:
        for session in (head, worker):
            s3 = session.client("s3")
            assert not refused(s3.put_object, Bucket=BUCKET, Key="r/x", Body=b"1")
            assert not refused(s3.get_object, Bucket=BUCKET, Key="r/x")
            assert not refused(s3.list_objects_v2, Bucket=BUCKET)
            assert not refused(s3.delete_object, Bucket=BUCKET, Key="r/x")
            assert refused(s3.put_object, Bucket="somebody-elses", Key="x", Body=b"1")
            assert refused(session.client("iam").list_users)
        assert not refused(head.client("ec2").describe_instances)
        assert refused(worker.client("ec2").describe_instances)

    rights()


def launch(provider: Any, config: Config, tracker: NodeProviderAvailabilityTracker, node_type: str) -> int:
    """Let Ray's launcher start a node of a type; return how many came."""
    pending = ConcurrentCounter()
    pending.inc(node_type, 1)
    launcher = BaseNodeLauncher(
        provider=provider,
        pending=pending,
        event_summarizer=EventSummarizer(),
        node_provider_availability_tracker=tracker,
        node_types=config["available_node_types"],
    )
    return len(launcher.launch_node(config, 1, node_type))


@pytest.fixture
def wanted(config: Config, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what Ray's autoscaler starts for two trials when it knows what could be had, with cluster.yaml's score."""
    said = config["head_start_ray_commands"][-1].split("RAY_AUTOSCALER_UTILIZATION_SCORER=")[1].split()[0]

    def ask(provider: Any, tracker: NodeProviderAvailabilityTracker, *, score: str = said) -> dict[str, int]:
        monkeypatch.setenv("RAY_AUTOSCALER_UTILIZATION_SCORER", score)
        scheduler = ResourceDemandScheduler(
            provider, config["available_node_types"], config["max_workers"], config["head_node_type"], 1.0
        )
        nodes = provider.non_terminated_nodes({})
        wanted, _ = scheduler.get_nodes_to_launch(nodes, {}, [], {}, [TRIAL, TRIAL], {}, [], tracker.summary())
        return dict(wanted)

    return ask


def out_of_spot(provider: Any) -> None:
    """Let EC2 have no spot machine."""

    def refuse(params: Config, **_: Any) -> None:
        if "InstanceMarketOptions" in params:
            error = {"Code": "InsufficientInstanceCapacity", "Message": "There is no Spot capacity available"}
            raise botocore.exceptions.ClientError({"Error": error}, "RunInstances")

    provider.ec2_fail_fast.meta.client.meta.events.register("provide-client-params.ec2.RunInstances", refuse)


def test_on_demand_takes_over_while_there_is_no_spot(provider: Any, config: Config, wanted: Any) -> None:
    later = [0.0]
    tracker = NodeProviderAvailabilityTracker(timer=lambda: time.time() + later[0])
    start(provider, config, "head")
    assert wanted(provider, tracker) == {"spot": 2}
    out_of_spot(provider)
    assert launch(provider, config, tracker, "spot") == 0
    assert wanted(provider, tracker) == {"on-demand": 2}
    assert wanted(provider, tracker, score=RAYS_OWN) == {"spot": 2}, "Ray has learnt it: spot_fallback can go"
    assert launch(provider, config, tracker, "on-demand") == 1
    later[0] = 31 * 60.0
    assert wanted(provider, tracker) == {"spot": 1}, "half an hour later the market is asked again"


def test_autoscaler_v2_does_not_learn_of_a_refusal() -> None:
    # What v2 makes of a node that AWS refused (reconciler.py, `_try_resolve_pending_allocation`). When this fails, v2
    # and its `priority` can take the place of v1 and spot_fallback.
    monitor = CloudResourceMonitor()
    monitor.notify([InstanceUpdateEvent(instance_type="spot", new_instance_status=Instance.ALLOCATION_FAILED)])
    assert monitor.get_recoverable_resource_availabilities() == {}
    monitor.notify([InstanceUpdateEvent(instance_type="spot", new_instance_status=Instance.ALLOCATION_TIMEOUT)])
    assert monitor.get_recoverable_resource_availabilities() == {"spot": 0.0}
