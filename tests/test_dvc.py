"""The pipeline in dvc.yaml, run by the real DVC; data pushed to and pulled from a folder and an S3 endpoint."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.conftest import EXPERIMENT, ROOT
from tests.pipeline_copy import pipeline_folder, run

STAGES = ["prepare", "train", "evaluate", "onnx", "export", "archive"]
UP_TO_DATE = "Data and pipelines are up to date."


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, mirror) -> Path:
    return pipeline_folder(tmp_path_factory.getbasetemp(), mirror)


@pytest.fixture
def s3_endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_the_lock_is_of_the_files_in_git():
    """Else `dvc repro` in a fresh clone would train anew, for hours."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    names = tracked.stdout.splitlines()
    entries = [
        entry
        for stage in yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"].values()
        for entry in [*stage.get("deps", []), *stage.get("outs", [])]
    ]
    found = {entry["path"]: (dvc_md5(entry["path"], names), entry["md5"]) for entry in entries}
    of_git = {path: hashes for path, hashes in found.items() if hashes[0]}
    assert {"src/models", "src/training/train.py", "models/best_model/model.safetensors"} <= of_git.keys()
    assert not {path for path, (now, locked) in of_git.items() if now != locked}, "run: dvc commit"


def dvc_md5(path: str, names: list[str]) -> str:
    """What DVC calls the MD5 of ``path``, a file or a folder of git's ``names``; "" for one that is not in git."""
    inside = sorted(name.removeprefix(f"{path}/") for name in names if name.startswith(f"{path}/"))
    if inside:
        listed = [{"md5": dvc_md5(f"{path}/{name}", names), "relpath": name} for name in inside]
        return hashlib.md5(json.dumps(listed).encode()).hexdigest() + ".dir"
    return hashlib.md5((ROOT / path).read_bytes()).hexdigest() if path in names else ""


def checksums(folder: Path, paths: list[str]) -> dict[str, str]:
    """SHA-256 of every file below ``paths``, without the raw downloads."""
    files = [file for path in paths for file in [folder / path, *(folder / path).rglob("*")] if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if "raw" not in file.relative_to(folder).parts
    }


def cached_outputs(folder: Path) -> list[str]:
    """The outputs that DVC, and not git, keeps."""
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    outputs = [output for stage in stages.values() for output in stage.get("outs", [])]
    entries = [output if isinstance(output, dict) else {output: {}} for output in outputs]
    return [path for entry in entries for path, options in entry.items() if options.get("cache", True)]


def forget_outputs(folder: Path) -> None:
    """Delete what DVC keeps: the outputs, and its cache of them."""
    shutil.rmtree(folder / ".dvc" / "cache")
    for path in cached_outputs(folder):
        target = folder / path
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()


def test_repro_makes_every_output(pipeline):
    locked = yaml.safe_load((pipeline / "dvc.lock").read_text())["stages"]
    assert locked.keys() == set(STAGES)
    for stage in locked.values():
        for output in stage["outs"]:
            assert (pipeline / output["path"]).exists(), output["path"]
    data = next(output for output in locked["prepare"]["outs"] if output["path"] == "data/fashion_mnist")
    assert data["nfiles"] == 4, "the raw downloads must not be versioned"


def test_second_repro_does_nothing(pipeline):
    # The commit of the outputs lies between the two: a model's git_commit must not make it stale.
    before = (pipeline / "dvc.lock").read_text()
    assert UP_TO_DATE in run(pipeline, "dvc", "repro")
    assert (pipeline / "dvc.lock").read_text() == before
    assert run(pipeline, "git", "status", "--porcelain") == ""


def test_raw_downloads_may_be_deleted(pipeline):
    shutil.rmtree(pipeline / "data" / "fashion_mnist" / "raw")
    assert UP_TO_DATE in run(pipeline, "dvc", "repro")


@pytest.mark.parametrize(
    ("file", "before", "after", "stages"),
    [
        (EXPERIMENT, "learning_rate: ", "learning_rate: 1", ["train"]),
        (EXPERIMENT, "limit: 1000", "limit: 900", ["prepare", "train"]),
        ("configs/config.yaml", "limit: null", "limit: 900", ["prepare", "train"]),
        ("configs/config.yaml", "opset: 17", "opset: 18", ["onnx"]),
    ],
)
def test_a_change_runs_the_stages_that_read_it(pipeline, file, before, after, stages):
    path = pipeline / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    try:
        changed = json.loads(run(pipeline, "dvc", "status", "--json"))
    finally:
        path.write_text(text)
    assert list(changed) == stages


def test_metrics_show_and_diff(pipeline):
    measured = json.loads((pipeline / "metrics" / "test_metrics.json").read_text())
    shown = json.loads(run(pipeline, "dvc", "metrics", "show", "--json"))
    assert shown[""]["data"]["metrics/test_metrics.json"]["data"]["accuracy"] == measured["accuracy"]
    changes = json.loads(run(pipeline, "dvc", "metrics", "diff", "HEAD~1", "--json"))
    accuracy = changes["metrics/test_metrics.json"]["accuracy"]
    assert accuracy["new"] == measured["accuracy"]
    assert "accuracy" in run(pipeline, "dvc", "metrics", "diff", "HEAD~1")


def test_plots_and_dag(pipeline, tmp_path):
    run(pipeline, "dvc", "plots", "show", "--out", str(tmp_path))
    page = (tmp_path / "index.html").read_text()
    for name in ("train_loss", "val_accuracy", "val_f1", "confusion", "confusion_matrix.png"):
        assert name in page
    graph = run(pipeline, "dvc", "dag", "--dot")
    for edge in (
        '"prepare" -> "train"',
        '"train" -> "evaluate"',
        '"train" -> "onnx"',
        '"train" -> "export"',
        '"onnx" -> "export"',
        '"export" -> "archive"',
    ):
        assert edge in graph


def test_push_and_pull_with_the_default_remote(pipeline):
    before = checksums(pipeline, cached_outputs(pipeline))
    assert "data/fashion_mnist/train.npz" in before
    run(pipeline, "dvc", "push")
    forget_outputs(pipeline)
    run(pipeline, "dvc", "pull")
    assert checksums(pipeline, cached_outputs(pipeline)) == before
    assert UP_TO_DATE in run(pipeline, "dvc", "repro")


def test_push_and_pull_with_s3(pipeline, s3_endpoint):
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket="models")
    before = checksums(pipeline, cached_outputs(pipeline))
    run(pipeline, "dvc", "remote", "add", "--local", "s3", "s3://models/fashion-mnist")
    run(pipeline, "dvc", "remote", "modify", "--local", "s3", "endpointurl", s3_endpoint)
    try:
        run(pipeline, "dvc", "push", "--remote", "s3", **credentials)
        stored = client.list_objects_v2(Bucket="models", Prefix="fashion-mnist/")["KeyCount"]
        assert stored > len(before), "every file, and a listing for each folder"
        forget_outputs(pipeline)
        run(pipeline, "dvc", "pull", "--remote", "s3", **credentials)
    finally:
        run(pipeline, "dvc", "remote", "remove", "--local", "s3")
        client.close()
    assert checksums(pipeline, cached_outputs(pipeline)) == before
