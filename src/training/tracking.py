"""What a run leaves in MLflow: parameters, metrics by epoch, artifacts and the tags that make it traceable."""

import logging
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from sqlalchemy.exc import SQLAlchemyError

from src.config import flatten, to_yaml
from src.data.datamodule import prepared_hash
from src.data.download import md5

RUN_NAME = "run_id"  # the file beside the checkpoints that names their run
WEIGHTS_TAG = "weights_sha256"

logger = logging.getLogger(__name__)


class TrackingError(OSError):
    """MLflow's store, or where it keeps artifacts, cannot be used; the message names it, the reason and the remedy."""


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow raises for the store at ``uri``, and for S3 behind it, into a TrackingError."""
    place = f"MLflow at {without_password(uri)}"
    try:
        yield
    except ImportError as error:
        raise TrackingError(f"{place} needs a package that is missing ({error}); install it") from error
    except (MlflowException, SQLAlchemyError) as error:
        remedy = "check tracking.uri (MLFLOW_TRACKING_URI) and that its server runs"
        raise TrackingError(f"{place}: {first_line(error)}; {remedy}") from error
    except s3_errors() as error:
        remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and MLFLOW_S3_ENDPOINT_URL"
        raise TrackingError(f"{place} cannot store artifacts: {first_line(error)}; {remedy}") from error


def without_password(uri: str) -> str:
    """``uri`` as it may be shown."""
    return re.sub(r"//[^/@\s]*@", "//***@", uri)


def s3_errors() -> tuple[type[Exception], ...]:
    """What an upload to S3 raises; nothing where its client is not installed."""
    try:
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    return BotoCoreError, ClientError, S3UploadFailedError


def first_line(error: Exception) -> str:
    """Without where to read more, which SQLAlchemy adds, and without the password of a URI."""
    return without_password(str(error).partition("\n")[0])


class RunLogger(MLFlowLogger):
    """Lightning's MLflow logger, with epochs as MLflow's steps: runs with other batch sizes then share an axis."""

    def log_metrics(self, metrics, step: int | None = None) -> None:
        metrics = dict(metrics)
        super().log_metrics(metrics, int(metrics.pop("epoch", step or 0)))


def git_commit() -> str:
    """The commit of the working tree, with ``-dirty`` when it has changes; empty outside a repository."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def dvc_data_hash(config) -> str:
    """The MD5 that dvc.lock gives for the prepared data; prepare.py's own hash for what is no part of the pipeline, or
    was prepared otherwise than the lock says.

    Empty where nothing was prepared.
    """
    info = Path(config.paths.metrics, "data_info.yaml")
    lock = Path("dvc.lock")
    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {}) if lock.is_file() else {}
    for stage in stages.values():
        locked = {Path(output["path"]): output.get("md5") for output in stage.get("outs", [])}
        data = locked.get(Path(config.data.directory))
        if data and info.is_file() and locked.get(info) == md5(info):
            return data
    return prepared_hash(config.paths.metrics)


def read_run_id(checkpoints: str) -> str | None:
    """The MLflow run of the checkpoints in a folder; None where nothing was trained."""
    path = Path(checkpoints) / RUN_NAME
    return path.read_text().strip() if path.is_file() else None


def open_run(config, run_id: str | None = None, tags: dict[str, str] | None = None) -> RunLogger:
    """Start a run, or go on with ``run_id``, in the experiment and store that the config names.

    Raises TrackingError.
    """
    tags = {"dvc_data_hash": dvc_data_hash(config), "git_commit": git_commit()} | (tags or {})
    with store_errors(config.tracking.uri):
        run = RunLogger(config.tracking.experiment, tracking_uri=config.tracking.uri, run_id=run_id, tags=tags)
        if run_id is None:
            run.log_hyperparams({key: str(value) for key, value in (flatten(config) | short_names(config)).items()})
        else:
            run.experiment.update_run(run_id, "RUNNING")
            for key, value in tags.items():
                run.experiment.set_tag(run_id, key, value)
        own_id = run.run_id
    shown = without_password(config.tracking.uri)
    if own_id is not None:  # only the main process of a distributed training has one
        logger.info("MLflow run %s in experiment %s at %s", own_id, config.tracking.experiment, shown)
    return run


def short_names(config) -> dict[str, object]:
    """The parameters that people sort runs by, under the names they look for; ``seed`` has no other."""
    training = config.training
    return {
        "model_name": config.model.architecture,
        "dataset_name": config.name,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "batch_size": training.batch_size,
        "num_epochs": training.epochs,
    }


def log_going_on(run: RunLogger, epoch: int, epochs: int) -> None:
    """Say as tags that ``run`` went on from ``epoch``, to have ``epochs``: its parameters stay those it began with."""
    run.experiment.set_tag(run.run_id, "resumed_from_epoch", epoch)
    run.experiment.set_tag(run.run_id, "resumed_num_epochs", epochs)


def log_results(
    run: RunLogger, config, weights: str, metrics: dict[str, float], paths: list[Path], texts: dict[str, str]
) -> None:
    """Final ``metrics``, the SHA-256 of the best model's ``weights`` as a tag, and as artifacts of ``run`` the config,
    ``paths`` (files or folders that exist) and ``texts`` by file name. Raises TrackingError."""
    with store_errors(config.tracking.uri):
        run.log_metrics(metrics)
        run.experiment.set_tag(run.run_id, WEIGHTS_TAG, weights)
        for name, text in ({"config.yaml": to_yaml(config)} | texts).items():
            run.experiment.log_text(run.run_id, text, name)
        for path in paths:
            if path.is_dir():
                run.experiment.log_artifacts(run.run_id, str(path), artifact_path=path.name)
            elif path.is_file():
                run.experiment.log_artifact(run.run_id, str(path))


def log_evaluation(config, weights: str, metrics: dict, paths: list[Path]) -> None:
    """Add an evaluation to the MLflow run that trained the model with these ``weights`` (their SHA-256).

    Says so when no run of this folder did, or when it is not in this store. Raises TrackingError.
    """
    run_id = read_run_id(config.paths.checkpoints)
    if run_id is None:
        logger.info("no MLflow run to add to: the model was not trained in this folder")
        return
    uri = config.tracking.uri
    with store_errors(uri):
        client = MlflowClient(tracking_uri=uri)
        found = weights_of_run(client, run_id)
        if found is None:
            logger.info("MLflow run %s is not in %s; the evaluation is not logged", run_id, without_password(uri))
            return
        if found != weights:
            logger.info("the MLflow run of this folder trained another model; the evaluation is not logged")
            return
        for name, value in metrics.items():
            if isinstance(value, int | float):
                client.log_metric(run_id, f"test_{name}", value)
        for artifact in paths:
            client.log_artifact(run_id, str(artifact), artifact_path="evaluation")


def weights_of_run(client: MlflowClient, run_id: str) -> str | None:
    """The SHA-256 of the weights that a run trained, empty where it ended before; None where there is no such run."""
    try:
        return client.get_run(run_id).data.tags.get(WEIGHTS_TAG, "")
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None
