"""Prepare an AWS account for cluster.yaml, once: a bucket for results, and what head and workers may do.

    python docs/clusters/aws_account.py          # in the folder of cluster.yaml, with your AWS credentials

Makes, where it is not there yet, and prints the bucket:
- the bucket flatmin-sweep-ACCOUNT-REGION, closed to the public;
- the instance profile flatmin-sweep-worker: read and write that bucket, nothing else;
- the instance profile flatmin-sweep-head: the same, and start and end machines, which are handed flatmin-sweep-worker.

Ray's own profile, ray-autoscaler-v1, would not do: Ray gives it to the head alone (`_configure_iam_role` in
ray/autoscaler/_private/aws/config.py), so workers could not write results, and its policies (AmazonEC2FullAccess,
AmazonS3FullAccess) do not let the head hand a profile to a machine that it starts.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import yaml

HEAD, WORKER = "flatmin-sweep-head", "flatmin-sweep-worker"


def prepare(region: str) -> str:
    """Make what is not there yet; return the bucket's name.

    Args:
        region: Where the cluster is to run, as in cluster.yaml.
    """
    session = boto3.Session(region_name=region)
    account = session.client("sts").get_caller_identity()["Account"]
    bucket = f"flatmin-sweep-{account}-{region}"
    _make_bucket(session.client("s3"), bucket, region)
    iam = session.client("iam")
    _make_profile(iam, WORKER, _files(bucket))
    _make_profile(iam, HEAD, [*_files(bucket), *_machines(account)])
    # Machines of the spot market need this role, which an account has for good once it has had one.
    with suppress(iam.exceptions.InvalidInputException, iam.exceptions.EntityAlreadyExistsException):
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")
    return bucket


def _files(bucket: str) -> list[dict[str, Any]]:
    arn = f"arn:aws:s3:::{bucket}"
    objects = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    return [
        {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": arn},
        {"Effect": "Allow", "Action": objects, "Resource": f"{arn}/*"},
    ]


def _machines(account: str) -> list[dict[str, Any]]:
    verbs = ["Run", "Start", "Stop", "Terminate"]
    actions = [*(f"ec2:{verb}Instances" for verb in verbs), "ec2:CreateTags", "ec2:DeleteTags", "ec2:Describe*"]
    image = "arn:aws:ssm:*::parameter/aws/service/deeplearning/*"
    return [
        {"Effect": "Allow", "Action": actions, "Resource": "*"},
        {"Effect": "Allow", "Action": "ssm:GetParameters", "Resource": image},
        {"Effect": "Allow", "Action": "iam:PassRole", "Resource": f"arn:aws:iam::{account}:role/{WORKER}"},
    ]


def _policy(statements: list[dict[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


def _make_bucket(s3: Any, bucket: str, region: str) -> None:
    where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    with suppress(s3.exceptions.BucketAlreadyOwnedByYou):
        s3.create_bucket(Bucket=bucket, **where)
    closed = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=dict.fromkeys(closed, True))


def _make_profile(iam: Any, name: str, statements: list[dict[str, Any]]) -> None:
    machine = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    with suppress(iam.exceptions.EntityAlreadyExistsException):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=_policy([machine]))
    iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=_policy(statements))
    with suppress(iam.exceptions.EntityAlreadyExistsException):
        iam.create_instance_profile(InstanceProfileName=name)
    if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


if __name__ == "__main__":
    file = Path("cluster.yaml")
    if not file.exists():
        sys.exit(f"there is no {file} here; run this in the folder that holds it")
    print(f"results go to s3://{prepare(yaml.safe_load(file.read_text())['provider']['region'])}/NAME")
