"""What several test files share: a copy of the checkout, and a real TorchServe in it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
import yaml

from src.config import DEFAULT_CONFIG, load_config
from src.data.prepare import describe, prepare
from src.serving.client import Refused
from src.serving.management import Service
from src.serving.ports import free_ports
from src.serving.scaling import scale, unregister
from tests.drawing import GARMENTS, draw_dataset

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = yaml.safe_load((ROOT / "torchserve" / "model-config.yaml").read_text())["handler"]["runtime"]  # that ships
EXPERIMENT = "configs/experiment/fashion_mnist.yaml"
TIMEOUT = 30  # seconds for one HTTP request
HANG = 1500  # seconds after which a command is taken to hang; slow machines take many times longer than fast ones
DRAWN = {"train": 256, "validation": 64, "test": 64}  # images in each split of the drawn dataset

# A proxy cannot reach what the tests start; the programs that they start inherit this.
DIRECT = ",".join(filter(None, [os.environ.get("no_proxy", os.environ.get("NO_PROXY")), "127.0.0.1", "localhost"]))
os.environ |= {"no_proxy": DIRECT, "NO_PROXY": DIRECT}


@dataclass(frozen=True)
class Server:
    """A running TorchServe: its three addresses and the checkout it was started in."""

    inference: str
    management: str
    metrics: str
    root: Path

    def predict(self, data=None, *, files=None, headers=None) -> requests.Response:
        """POST to the model: ``data`` raw, ``files`` as multipart."""
        url = f"{self.inference}/predictions/fashion_mnist"
        return requests.post(url, data=data, files=files, headers=headers, timeout=TIMEOUT)

    def describe(self) -> dict:
        """The management API's description of the default version."""
        return requests.get(f"{self.management}/models/fashion_mnist", timeout=TIMEOUT).json()[0]


def copy_checkout(target: Path) -> Path:
    """Copy what git tracks or would track to ``target``; the serving environment is shared, not copied."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    )
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    environment = ROOT / "torchserve" / ".venv"
    environment.mkdir(exist_ok=True)
    (target / "torchserve" / ".venv").symlink_to(environment)
    return target


def edited(path: Path, changes: dict[str, str]) -> str:
    """The text of ``path`` with ``changes``, each of a text that must be in it."""
    text = path.read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def run_script(root: Path, *arguments: str, timeout: int = HANG, **environment: str) -> subprocess.CompletedProcess:
    """Run ``arguments`` in ``root`` to its end; output is text in ``stdout`` and ``stderr``."""
    return subprocess.run(
        arguments,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        # MLflow's set_tracking_uri writes into the environment of whoever called it.
        env={name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        | {"DVC_NO_ANALYTICS": "1"}
        | environment,
    )


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of this checkout that tests may change."""
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def shared(checkout) -> Server:
    """TorchServe as ./run_torchserve.sh starts it, on free ports; stopped at the end."""
    ports = free_ports(3)
    started = run_script(checkout, "./run_torchserve.sh", "--native", "--ports", ",".join(map(str, ports)))
    assert started.returncode == 0, started.stdout + started.stderr
    yield Server(*(f"http://127.0.0.1:{port}" for port in ports), checkout)
    stopped = run_script(checkout, "./run_torchserve.sh", "--stop")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr


@pytest.fixture(scope="module")
def server(shared) -> Iterator[Server]:
    """The running TorchServe, which all modules share: the next one finds it as this one did."""
    with lent(shared):
        yield shared


@contextmanager
def lent(server: Server) -> Iterator[None]:
    """Afterwards version 1.0 is the only one again, with one worker, and the model store holds what it held."""
    store = server.root / "torchserve" / "model-store"
    before = set(store.iterdir())
    try:
        yield
    finally:
        bring_back(Service("fashion_mnist", server.inference, server.management, server.metrics))
        for path in set(store.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def bring_back(service: Service) -> None:
    """Register version 1.0 if it is not, make it the default, take the others away, and leave it one worker."""
    try:
        versions = service.versions().keys()
    except Refused as error:
        if error.status != 404:
            raise
        versions = set()
    if "1.0" not in versions:
        service.register("fashion_mnist.mar&synchronous=false")
    service.manage("/1.0/set-default", "PUT")
    for version in versions - {"1.0"}:
        unregister(service, version)
    scale(service, 1)


@pytest.fixture(scope="session")
def sample() -> dict:
    """torchserve/sample_input.json."""
    return json.loads((ROOT / "torchserve" / "sample_input.json").read_text())


# ---- data: the real set from a local mirror, and a drawn one that trains in a second ----


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The networks of the tests are too small to gain from more, and lose much where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The folder that holds the official files; without one, what needs the real data is skipped."""
    folder = (ROOT / os.environ.get("DATA_MIRROR", "../shared/data")).resolve()
    if not (folder / "FashionMNIST" / "raw").is_dir():
        pytest.skip(f"no mirror of Fashion-MNIST at {folder}; name one with DATA_MIRROR")
    return folder


@pytest.fixture(scope="session")
def prepared(mirror, tmp_path_factory):
    """The config of the real data, prepared once into a folder of its own. Read only."""
    folder = tmp_path_factory.mktemp("prepared")
    config = load_config(
        ROOT / DEFAULT_CONFIG,
        [f"data.mirror={mirror}", f"data.directory={folder}/data", f"paths.metrics={folder}/metrics"],
    )
    prepare(config)
    return config


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """A prepared dataset of drawn garments: 256 training, 64 validation, 64 test images of four classes. Read only."""
    folder = tmp_path_factory.mktemp("drawn")
    splits = {name: draw_dataset(count, seed) for seed, (name, count) in enumerate(DRAWN.items())}
    for name, (images, labels) in splits.items():
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    (folder / "class_names.json").write_text(json.dumps(list(GARMENTS)))
    (folder / "data_info.yaml").write_text(yaml.safe_dump(describe(splits.items(), list(GARMENTS))))
    return folder


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory) -> str:
    """A tracking store for all tests: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def tiny_overrides(drawn, mlflow_store, tmp_path) -> list[str]:
    """Overrides of a training on the drawn data that takes a second and writes below ``tmp_path`` only."""
    paths = {name: f"{tmp_path}/models/{name}" for name in ("best_model", "final_model")}
    paths |= {name: f"{tmp_path}/{name}" for name in ("checkpoints", "logs", "plots")}
    return [
        f"data.directory={drawn}",
        f"paths.metrics={drawn}",
        *(f"paths.{name}={path}" for name, path in paths.items()),
        f"tracking.uri={mlflow_store}",
        f"tracking.experiment=test-{tmp_path.parent.name}-{tmp_path.name}",
        "model.resnet.widths=[8,16]",
        "model.resnet.blocks=[0,0]",
        "model.resnet.early_exits=[]",
        "training.epochs=2",
        "training.batch_size=32",
        "training.ema_decay=null",  # too few steps for an average
        "training.accelerator=cpu",
    ]


@pytest.fixture
def tiny_config(tiny_overrides, tmp_path, monkeypatch):
    """``tiny_config("key=value", ...)``: a config of such a training; the working directory is ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: load_config(ROOT / DEFAULT_CONFIG, [*tiny_overrides, *overrides])


def shrink_experiment(root: Path) -> None:
    """Make the flagship's experiment in ``root`` train a tiny network on 1,000 images for two epochs."""
    path = root / EXPERIMENT
    settings = yaml.safe_load(path.read_text())
    settings["data"] |= {"limit": 1000, "validation_size": 500}
    settings["model"] = {"architecture": "resnet", "resnet": {"widths": [4, 4, 4], "blocks": [0, 1, 1]}}
    settings["training"] |= {"epochs": 2, "batch_size": 100, "ema_decay": None}
    settings["export"] = {"calibration_images": 100, "max_accuracy_loss": 1.0}  # a net that knows little loses much
    path.write_text("# @package _global_\n" + yaml.safe_dump(settings))
