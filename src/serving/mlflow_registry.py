"""Log a model folder as a pyfunc that carries all it needs, and register it as ``models:/NAME/VERSION``."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Map

from src.inference import Predictor
from src.inference.runtimes import runtime_file
from src.models.config import CONFIG_NAME, WEIGHTS_NAME
from src.models.registry import NEED_TIMM
from src.serving.mlflow_model import INPUT

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (
    "__init__.py",
    "preprocessing.py",
    "image_limits.py",
    "plain_png.py",
    "styles.py",
    "models",
    "inference",
    "serving/__init__.py",
    "serving/mlflow_model.py",
)
REQUIREMENTS = ROOT / "torchserve" / "requirements.txt"
NEEDED = ("multipart", "numpy", "orjson", "pillow", "pyyaml")  # by every runtime
BY_RUNTIME = {"torch": ("torch", "safetensors"), "onnx": ("onnxruntime",), "onnx-int8": ("onnxruntime",)}
CONTENT_TAG = "content_sha256"
NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def register(folder: Path, name: str | None, runtime: str) -> tuple[str, bool]:
    """Register ``folder`` in the store that MLflow is set to; return (its URI, whether it is new).

    ``name``: the registered model's; None takes the one in ``config.json``. The same weights do not become another
    version, unless the config, the runtime, the code or the requirements have changed. Raises ModelError or ValueError
    for a folder or name that cannot be used, MlflowException when the store cannot.
    """
    config = Predictor.load(folder, runtime=runtime).config  # what cannot be loaded is not registered
    if config.architecture in NEED_TIMM and runtime_file(runtime) is None:
        raise ValueError(f"{config.architecture} needs timm, which a server has not: give --runtime onnx-int8 or onnx")
    name = name or config.name
    if not NAME.fullmatch(name):
        raise ValueError(f"the registered model's name is {name!r}; use letters, digits, _ . and -")
    requirements = pip_requirements(runtime)
    with tempfile.TemporaryDirectory() as work:
        data, code = stage(folder, runtime, Path(work))
        content = digest(Path(work), [runtime, *requirements])
        for found in MlflowClient().search_model_versions(f"name = '{name}'"):
            if found.tags.get(CONTENT_TAG) == content:
                return f"models:/{name}/{found.version}", False
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the one line printed is the model's URI
        mlflow.set_experiment(f"{config.name}-serving")
        with mlflow.start_run(run_name=name):
            logged = mlflow.pyfunc.log_model(
                name="model",
                loader_module="src.serving.mlflow_model",
                data_path=str(data),
                code_paths=[str(code)],
                model_config={"runtime": runtime},
                signature=signature(),
                input_example=input_example(),
                pip_requirements=requirements,
            )
    labels = {CONTENT_TAG: content, "runtime": runtime, "data_hash": config.data_hash, "git_commit": config.git_commit}
    made = mlflow.register_model(logged.model_uri, name, tags=labels)
    return f"models:/{name}/{made.version}", True


def stage(folder: Path, runtime: str, target: Path) -> tuple[Path, Path]:
    """Copy what the logged model holds into ``target``; return the folders of the model and of the code."""
    data, code = target / "model", target / "src"
    data.mkdir()
    for name in (CONFIG_NAME, runtime_file(runtime) or WEIGHTS_NAME):
        shutil.copyfile(folder / name, data / name)
    for name in SHIPPED:
        source, copy = ROOT / "src" / name, code / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, copy)
    return data, code


def digest(folder: Path, settings: list[str]) -> str:
    """SHA-256 over the names and bytes of all files below ``folder``, and ``settings``."""
    total = hashlib.sha256(json.dumps(settings).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def pip_requirements(runtime: str) -> list[str]:
    """What the logged model needs: the pins that TorchServe's environment has, and this MLflow."""
    pins = {}
    for line in REQUIREMENTS.read_text().splitlines():
        if pin := re.match(r"([\w.-]+)==[^\s#]+", line):
            pins[pin.group(1).lower()] = pin.group()
    return [f"mlflow=={version('mlflow')}", *(pins[name] for name in (*NEEDED, *BY_RUNTIME[runtime]))]


def signature() -> ModelSignature:
    """One input that holds strings or a whole tensor, which only a tensor of objects can say; docs/servers.md."""
    answer = {
        "predicted_class": DataType.long,
        "predicted_label": DataType.string,
        "confidence": DataType.double,
        "uncertain": DataType.boolean,
        "probabilities": Map(DataType.double),
        "model_version": DataType.string,
    }
    return ModelSignature(
        Schema([TensorSpec(np.dtype(object), (-1,), INPUT)]),
        Schema([ColSpec(kind, name) for name, kind in answer.items()]),
        ParamSchema(
            [
                ParamSpec("bad_images", DataType.string, "refuse"),
                ParamSpec("describe", DataType.boolean, False),
            ]
        ),
    )


def input_example() -> pd.DataFrame:
    """The picture of torchserve/sample_input.json; any picture is a valid input of any model."""
    sample = json.loads((ROOT / "torchserve" / "sample_input.json").read_text())
    return pd.DataFrame({INPUT: [sample["image"]]})
