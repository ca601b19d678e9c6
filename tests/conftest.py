"""What several test files share: a copy of the checkout, and a real TorchServe in it."""

import json
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 30  # seconds for one HTTP request


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


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def copy_checkout(target: Path) -> Path:
    """Copy what git tracks or would track to ``target``; the serving environment is shared, not copied."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, timeout=60,
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


def run_script(root: Path, *arguments: str, timeout: int = 400, **environment: str) -> subprocess.CompletedProcess:
    """Run ``arguments`` in ``root`` to its end; output is text in ``stdout`` and ``stderr``."""
    return subprocess.run(
        arguments, cwd=root, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of this checkout that tests may change."""
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def server(checkout) -> Server:
    """TorchServe as ./run_torchserve.sh starts it, on free ports; stopped at the end."""
    ports = free_ports(3)
    started = run_script(checkout, "./run_torchserve.sh", "--native", "--ports", ",".join(map(str, ports)))
    assert started.returncode == 0, started.stdout + started.stderr
    yield Server(*(f"http://127.0.0.1:{port}" for port in ports), checkout)
    stopped = run_script(checkout, "./run_torchserve.sh", "--stop")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr


@pytest.fixture(scope="session")
def sample() -> dict:
    """torchserve/sample_input.json."""
    return json.loads((ROOT / "torchserve" / "sample_input.json").read_text())
