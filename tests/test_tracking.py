"""What training leaves in MLflow, read back from real stores: SQLite files and a running server."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import mlflow
import pytest
import yaml
from mlflow import MlflowClient

from src.config import load_config
from src.serving.ports import free_ports
from src.training.tracking import (
    TrackingError,
    dvc_data_hash,
    git_commit,
    log_evaluation,
    log_going_on,
    log_results,
    open_run,
)
from tests.conftest import ROOT
from tests.mlflow_store import new_store
from tests.pipeline_copy import pipeline_folder
from tests.s3_server import EVERYTHING, checked_s3
from tests.waiting import wait_until_answers

EXPERIMENT = "fashion-mnist-classification"


@pytest.fixture(autouse=True)
def store(tmp_path, tmp_path_factory, monkeypatch):
    """Work in an empty folder with a store of its own, and leave MLflow's settings in the process as they were."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path_factory.getbasetemp(), tmp_path))
    monkeypatch.chdir(tmp_path)
    yield os.environ["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, mirror) -> Path:
    return pipeline_folder(tmp_path_factory.getbasetemp(), mirror)


@pytest.fixture
def server(tmp_path):
    """The address of a running ``mlflow server``."""
    port = free_ports(1)[0]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--workers",
                "1",
                "--backend-store-uri",
                f"sqlite:///{tmp_path / 'server.db'}",
                "--artifacts-destination",
                str(tmp_path / "artifacts"),
            ],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_answers(f"{address}/health", process, tmp_path / "server.log")
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # it and its worker; nothing of its store is read again
            process.wait(timeout=60)


def best_run():
    """As the README finds it, the best on validation: one row."""
    return mlflow.search_runs(
        experiment_names=[EXPERIMENT], order_by=["metrics.best_val_accuracy DESC"], max_results=1
    ).iloc[0]


def artifact_paths(client: MlflowClient, run_id: str) -> set[str]:
    """Every file among a run's artifacts."""
    files, folders = set(), [None]
    while folders:
        for item in client.list_artifacts(run_id, folders.pop()):
            if item.is_dir:
                folders.append(item.path)
            else:
                files.add(item.path)
    return files


def test_pipeline_run_is_recorded(pipeline):
    mlflow.set_tracking_uri(f"sqlite:///{pipeline / 'mlflow.db'}")
    client, run = MlflowClient(), best_run()
    assert run["status"] == "FINISHED"
    assert run["params.training.epochs"] == "2"
    assert run["params.data.limit"] == "1000"
    for name in ("train_loss", "train_accuracy", "train_f1", "val_loss", "val_accuracy", "val_f1"):
        assert [point.step for point in client.get_metric_history(run["run_id"], name)] == [0, 1], name
    card = json.loads((pipeline / "models" / "best_model" / "config.json").read_text())
    # evaluate.py folds batch norm into the convolutions, which may round an undecided image the other way.
    assert run["metrics.test_accuracy"] == pytest.approx(card["metrics"]["test_accuracy"], abs=1e-3)
    assert run["metrics.best_val_accuracy"] == pytest.approx(card["metrics"]["val_accuracy"])
    assert artifact_paths(client, run["run_id"]) >= {
        "best_model/config.json",
        "best_model/model.safetensors",
        "config.yaml",
        "dvc.lock",
        "training.log",
        "loss.png",
        "accuracy.png",
        "f1.png",
        "training_history.csv",
    }


def test_pipeline_run_is_traceable(pipeline):
    mlflow.set_tracking_uri(f"sqlite:///{pipeline / 'mlflow.db'}")
    tags = MlflowClient().get_run(best_run()["run_id"]).data.tags
    locked = yaml.safe_load((pipeline / "dvc.lock").read_text())["stages"]["prepare"]["outs"]
    assert tags["dvc_data_hash"] in [output["md5"] for output in locked if output["path"] == "data/fashion_mnist"]
    first = subprocess.run(
        ["git", "rev-parse", "HEAD~1"], cwd=pipeline, capture_output=True, text=True, check=True, timeout=30
    )
    # The tiny experiment was not committed yet when it ran.
    assert tags["git_commit"] == f"{first.stdout.strip()}-dirty"


def test_server_named_by_the_environment(server, store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    plot = tmp_path / "loss.png"
    plot.write_bytes(b"a plot")
    for accuracy in (0.9, 0.7):
        config = load_config(ROOT / "configs" / "config.yaml", ["training.epochs=7"])
        run = open_run(config)
        run.log_metrics({"val_accuracy": accuracy, "epoch": 3}, step=100)
        measured = {"best_val_accuracy": accuracy, "test_accuracy": accuracy}
        log_results(run, config, "weights", measured, [plot, tmp_path / "absent.txt"], {"training.log": "epoch 0"})
        run.finalize("success")
    best = best_run()
    assert best["metrics.test_accuracy"] == 0.9
    assert best["params.training.epochs"] == "7"
    client = MlflowClient(server)
    assert [point.step for point in client.get_metric_history(best["run_id"], "val_accuracy")] == [3]
    assert artifact_paths(client, best["run_id"]) == {"config.yaml", "loss.png", "training.log"}
    mlflow.set_tracking_uri(store)
    assert mlflow.search_runs(search_all_experiments=True).empty, "nothing went to the local store"


def test_a_run_that_left_no_model_is_never_best():
    config = load_config(ROOT / "configs" / "config.yaml")
    left_one = {"best_val_accuracy": 0.1, "test_accuracy": 0.1}
    for metrics in ({"val_accuracy": 0.99}, left_one, {"sweep_val_accuracy": 0.98}):
        open_run(config).log_metrics(metrics)
    assert best_run()["metrics.test_accuracy"] == 0.1


def test_going_on_with_a_run_adds_to_it():
    config = load_config(ROOT / "configs" / "config.yaml")
    first = open_run(config, tags={"git_commit": "of the first part"})
    first.log_metrics({"val_accuracy": 0.5, "epoch": 0})
    first.finalize("failed")
    again = open_run(config, first.run_id, {"git_commit": "of the second"})
    log_going_on(again, 1, 2)
    again.log_metrics({"val_accuracy": 0.6, "epoch": 1})
    history = MlflowClient().get_metric_history(first.run_id, "val_accuracy")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 0.6)]
    run = MlflowClient().get_run(first.run_id)
    assert run.info.status == "RUNNING"
    expected = {"git_commit": "of the second", "resumed_from_epoch": "1", "resumed_num_epochs": "2"}
    assert expected.items() <= run.data.tags.items()


def test_evaluation_joins_the_run_that_trained(tmp_path):
    config = load_config(ROOT / "configs" / "config.yaml")
    log_evaluation(config, "ours", {"accuracy": 0.8}, [])  # a model that was trained elsewhere
    run = open_run(config)
    log_results(run, config, "ours", {}, [], {})
    checkpoints = tmp_path / config.paths.checkpoints
    checkpoints.mkdir(parents=True)
    (checkpoints / "run_id").write_text(run.run_id)
    log_evaluation(config, "ours", {"accuracy": 0.8, "targets_missed": []}, [])
    log_evaluation(config, "another's", {"accuracy": 0.9}, [])
    assert MlflowClient().get_run(run.run_id).data.metrics == {"test_accuracy": 0.8}
    (checkpoints / "run_id").write_text("0" * 32)
    log_evaluation(config, "ours", {"accuracy": 0.8}, [])


def test_a_server_that_cannot_be_reached_is_not_one_without_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    place = f"127.0.0.1:{free_ports(1)[0]}"
    config = load_config(ROOT / "configs" / "config.yaml", [f"tracking.uri='http://me:secret@{place}'"])
    (tmp_path / config.paths.checkpoints).mkdir(parents=True)
    (tmp_path / config.paths.checkpoints / "run_id").write_text("0" * 32)
    with pytest.raises(TrackingError, match=rf"MLflow at http://\*\*\*@{place}: .*check tracking\.uri") as caught:
        log_evaluation(config, "ours", {"accuracy": 0.8}, [])
    assert "secret" not in str(caught.value)
    with pytest.raises(TrackingError, match=rf"MLflow at http://\*\*\*@{place}: "):
        open_run(config)


def test_a_database_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # ten tries take 100 seconds
    (tmp_path / "folder.db").mkdir()
    config = load_config(ROOT / "configs" / "config.yaml", [f"tracking.uri='sqlite:///{tmp_path}/folder.db'"])
    with pytest.raises(TrackingError, match=r"folder\.db: .*unable to open database file; check tracking\.uri"):
        open_run(config)


def test_a_database_whose_driver_is_missing_is_named_without_its_password():
    overrides = ["tracking.uri='postgresql://me:secret@localhost/mlflow'"]
    with pytest.raises(TrackingError, match=r"needs a package that is missing .*psycopg") as caught:
        open_run(load_config(ROOT / "configs" / "config.yaml", overrides))
    assert "secret" not in str(caught.value)


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """The keys of a bucket in an S3 that checks them, where the experiment's artifacts go; none is set."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with checked_s3("my-bucket", EVERYTHING) as (endpoint, found):
        settings = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1", "HOME": str(tmp_path)}
        for name, value in (settings | {"MLFLOW_S3_ENDPOINT_URL": endpoint}).items():
            monkeypatch.setenv(name, value)
        boto3.setup_default_session()  # the one of an earlier test remembers its keys
        MlflowClient().create_experiment(EXPERIMENT, artifact_location="s3://my-bucket/mlflow")
        yield found


def test_artifacts_go_to_s3_and_come_back(keys, tmp_path, monkeypatch):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "loss.png").write_bytes(b"a plot")
    config = load_config(ROOT / "configs" / "config.yaml")
    run = open_run(config)
    log_results(run, config, "weights", {}, [tmp_path / "loss.png"], {"training.log": "epoch 0"})
    assert artifact_paths(MlflowClient(), run.run_id) == {"config.yaml", "loss.png", "training.log"}
    found = mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path="loss.png", dst_path=f"{tmp_path}/got")
    assert Path(found).read_bytes() == b"a plot"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda keys: {}, "Unable to locate credentials"),
        (lambda keys: keys | {"AWS_ACCESS_KEY_ID": "wrong"}, "InvalidAccessKeyId"),
        (lambda keys: keys | {"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
    ],
    ids=["none", "unknown", "wrong secret"],
)
def test_artifacts_that_s3_does_not_take_are_an_error_with_the_remedy(given, reason, keys, monkeypatch):
    for name, value in given(keys).items():
        monkeypatch.setenv(name, value)
    config = load_config(ROOT / "configs" / "config.yaml")
    run = open_run(config)
    with pytest.raises(TrackingError, match=rf"cannot store artifacts: .*{reason}.*; check AWS_ACCESS_KEY_ID"):
        log_results(run, config, "weights", {}, [], {})


PREPARED = "stages: {{prepare: {{outs: [{{path: data/x, md5: abc.dir}}, {{path: metrics/data_info.yaml, md5: {}}}]}}}}"


@pytest.mark.parametrize(
    ("lock", "expected"),
    [
        (None, "ours"),
        ("", "ours"),
        ("stages: {train: {outs: [{path: models, md5: 1}]}}", "ours"),
        ("stages: {prepare: {outs: [{path: data/x, md5: abc.dir}]}}", "ours"),
        (PREPARED.format(hashlib.md5(b"data_hash: ours", usedforsecurity=False).hexdigest()), "abc.dir"),
        (PREPARED.format("that-of-other-data"), "ours"),
    ],
)
def test_data_hash_from_the_lock_of_the_data_that_lies_here(tmp_path, lock, expected):
    if lock is not None:
        (tmp_path / "dvc.lock").write_text(lock)
    config = load_config(ROOT / "configs" / "config.yaml", ["data.directory=data/x"])
    assert dvc_data_hash(config) == ""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "data_info.yaml").write_text("data_hash: ours")
    assert dvc_data_hash(config) == expected


def test_no_commit_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == ""
