"""An S3 that checks the keys and rights of every request, as Amazon's does."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import requests
from moto.server import ThreadedMotoServer

EVERYTHING = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


def keys_of(answer: dict) -> dict[str, str]:
    """An access key as programs read it from the environment."""
    key = answer["AccessKey"]
    return {
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def checked_s3(bucket: str, *policies: dict) -> Iterator[tuple]:
    """``(endpoint, keys...)`` of a server that holds an empty ``bucket``: the keys of one user for each IAM policy."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    settings = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    settings |= {"aws_access_key_id": "setup", "aws_secret_access_key": "setup"}
    iam, s3 = boto3.client("iam", **settings), boto3.client("s3", **settings)
    s3.create_bucket(Bucket=bucket)
    keys = []
    for number, policy in enumerate(policies):
        name = f"user{number}"
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
        keys.append(keys_of(iam.create_access_key(UserName=name)))
    for client in (iam, s3):
        client.close()
    requests.post(f"{endpoint}/moto-api/reset-auth", data="0", timeout=30)  # from here on, keys and policies count
    try:
        yield endpoint, *keys
    finally:
        requests.post(f"{endpoint}/moto-api/reset-auth", data="inf", timeout=30)
        requests.post(f"{endpoint}/moto-api/reset", timeout=30)  # it is this process's, whichever server asks
        server.stop()
