"""An S3 remote whose keys may only read, as docs/data_and_experiments.md shows it: DVC pulls, and cannot push."""

import json
import shutil
import sys
from pathlib import Path

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer

from tests.conftest import ROOT, run_script
from tests.pipeline_copy import run

PAGE = (ROOT / "docs" / "data_and_experiments.md").read_text()
POLICY = json.loads(PAGE.split("```json\n")[1].split("```")[0])  # the one that the page tells people to use
BUCKET, PREFIX = "my-bucket", "fashion-mnist"


def keys_of(answer: dict) -> dict[str, str]:
    """An access key as DVC reads it from the environment."""
    key = answer["AccessKey"]
    return {
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def store():
    """``(endpoint, a writer's keys, a reader's keys)`` of an S3 that checks every request against IAM policies."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    settings = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    settings |= {"aws_access_key_id": "setup", "aws_secret_access_key": "setup"}
    iam, s3 = boto3.client("iam", **settings), boto3.client("s3", **settings)
    s3.create_bucket(Bucket=BUCKET)
    everything = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policies = {"writer": {"Version": "2012-10-17", "Statement": [everything]}, "reader": POLICY}
    keys = []
    for name, policy in policies.items():
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
        keys.append(keys_of(iam.create_access_key(UserName=name)))
    for client in (iam, s3):
        client.close()
    requests.post(f"{endpoint}/moto-api/reset-auth", data="0", timeout=30)  # from here on, keys and policies count
    yield endpoint, *keys
    requests.post(f"{endpoint}/moto-api/reset-auth", data="inf", timeout=30)
    server.stop()


def forget(folder: Path) -> None:
    """Delete the data and DVC's cache of it."""
    shutil.rmtree(folder / ".dvc" / "cache")
    (folder / "data.bin").unlink()


def test_a_reader_pulls_and_cannot_push(store, tmp_path):
    endpoint, writer, reader = store
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "data.bin").write_bytes(bytes(1000))
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    run(folder, "dvc", "add", "data.bin")
    run(folder, "dvc", "remote", "add", "--default", "s3", f"s3://{BUCKET}/{PREFIX}")
    run(folder, "dvc", "remote", "modify", "s3", "endpointurl", endpoint)
    run(folder, "dvc", "push", **writer)
    forget(folder)
    run(folder, "dvc", "pull", **reader)
    assert (folder / "data.bin").read_bytes() == bytes(1000)

    (folder / "data.bin").write_bytes(b"changed")
    run(folder, "dvc", "add", "data.bin")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    refused = run_script(folder, "dvc", "push", PATH=path, DVC_SITE_CACHE_DIR=f"{tmp_path}/dvc-site", **reader)
    assert refused.returncode != 0
    assert "Access Denied" in refused.stderr, refused.stderr
    forget(folder)
    lost = run_script(folder, "dvc", "pull", PATH=path, DVC_SITE_CACHE_DIR=f"{tmp_path}/dvc-site", **reader)
    assert lost.returncode != 0, "what was refused is not in the bucket"
