"""run_torchserve.sh in a copy of the checkout, run as someone without Java or Docker does; and what runs after it."""

import json
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from src.serving.tls import pin
from tests.conftest import HANG, TIMEOUT
from tests.waiting import wait_until

# All that the scripts and TorchServe call; java, docker and nvidia-smi are not among them.
TOOLS = (
    *("bash", "cat", "chmod", "cp", "cut", "date", "dirname", "env", "find", "flock", "grep", "head", "id", "kill"),
    *("ln", "mkdir", "mktemp", "mv", "python3", "readlink", "rm", "sed", "seq", "setsid", "sh", "sha256sum", "sleep"),
    *("tail", "timeout", "tr"),
)


def bare_environment(folder: Path) -> dict[str, str]:
    """The environment of a machine that has neither Java nor Docker; ``folder`` becomes its PATH."""
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    return {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "PYTHONPATH")} | {"PATH": str(folder)}


class OneCertificate(requests.adapters.HTTPAdapter):
    """Trusts the one certificate in a file, for any name, as the clients of src/serving do."""

    def __init__(self, certificate: Path):
        self.certificate = certificate
        super().__init__()

    def init_poolmanager(self, *arguments, **options):
        super().init_poolmanager(*arguments, ssl_context=pin(self.certificate), assert_hostname=False, **options)


@dataclass(frozen=True)
class Run:
    """A checkout whose script serves on ``ports``."""

    root: Path
    ports: list[int]
    environment: dict[str, str]

    def script(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """Run the script as someone without Java or Docker would."""
        return subprocess.run(
            [self.root / "run_torchserve.sh", *arguments], cwd=cwd or self.root, capture_output=True, text=True,
            timeout=HANG, stdin=subprocess.DEVNULL, env=self.environment | environment,
        )  # fmt: skip

    def create(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run ./create_mar_archive.sh."""
        return subprocess.run(
            [self.root / "create_mar_archive.sh", *arguments], cwd=self.root, capture_output=True, text=True,
            timeout=HANG, stdin=subprocess.DEVNULL, env=self.environment,
        )  # fmt: skip

    def start(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        done = self.script("--ports", ",".join(map(str, self.ports)), *arguments, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def keys(self) -> dict:
        return json.loads((self.root / "torchserve" / ".run" / "key_file.json").read_text())

    def request(self, method: str, port: int, path: str, key: str = "", **options) -> requests.Response:
        """A request to a port, by https when the server was started with --secure."""
        certificate = self.root / "torchserve" / ".run" / "tls" / "certificate.pem"
        secure = (self.root / "torchserve" / ".run" / "key_file.json").exists()
        headers = ({"Authorization": f"Bearer {key}"} if key else {}) | options.pop("headers", {})
        with requests.Session() as session:
            if secure:
                session.verify = str(certificate)
                session.mount("https://", OneCertificate(certificate))
            url = f"http{'s' if secure else ''}://127.0.0.1:{port}{path}"
            return session.request(method, url, headers=headers, timeout=TIMEOUT, **options)

    def get(self, path: str, key: str = "") -> requests.Response:
        """GET from the management API."""
        return self.request("GET", self.ports[1], path, key)

    def predict(self, key: str = "", body: bytes | None = None, **options) -> requests.Response:
        """POST ``body``, or the sample, to the model."""
        if body is None:
            body = (self.root / "torchserve" / "sample_input.json").read_bytes()
        return self.request("POST", self.ports[0], "/predictions/fashion_mnist", key, data=body, **options)


def listening(root: Path) -> list:
    """The addresses, each with ``ip`` and ``port``, on which ``root``'s server and its workers accept connections."""
    server, found = psutil.Process(pid_of(root)), []
    for process in (server, *server.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # TorchServe asks ps for the memory of its workers
            found += [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return found


def pid_of(root: Path) -> int:
    return int((root / "torchserve" / ".run" / "tmp" / ".model_server.pid").read_text())


def processes_of(root: Path) -> list[psutil.Process]:
    """TorchServe and its workers: all that runs in a folder below ``root`` or has its temporary folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(root / "torchserve"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_none(root: Path) -> None:
    wait_until(lambda: not processes_of(root), 60, lambda: processes_of(root))
