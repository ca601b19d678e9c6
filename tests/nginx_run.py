"""deploy/nginx/nginx.conf as it is, on another port, in front of a server of the tests."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from src.serving.ports import free_ports
from src.serving.tls import pin
from tests.certificates import write_pair
from tests.conftest import ROOT, TIMEOUT, edited
from tests.waiting import stop, wait_until

CONFIG = ROOT / "deploy" / "nginx" / "nginx.conf"
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # folders; the defaults belong to root


@dataclass(frozen=True)
class Front:
    """A running nginx."""

    port: int
    certificate: Path

    def request(self, method: str, path: str, data=None, **options) -> requests.Response:
        url = f"https://localhost:{self.port}{path}"
        return requests.request(method, url, data=data, verify=self.certificate, timeout=4 * TIMEOUT, **options)

    def predict(self, data=None, **options) -> requests.Response:
        return self.request("POST", "/predictions/fashion_mnist", data, **options)

    def connect(self) -> socket.socket:
        """A TLS connection; to send what no client library would."""
        return pin(self.certificate).wrap_socket(socket.create_connection(("127.0.0.1", self.port), TIMEOUT))

    def send(self, text: bytes) -> bytes:
        """Send ``text`` and read until nginx closes."""
        with self.connect() as connection:
            connection.sendall(text)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextmanager
def nginx(folder: Path, server, changes: dict[str, str]) -> Iterator[Front]:
    """The shipped configuration with ``changes``, each of a text that must be in it, in front of ``server``."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not program:
        pytest.skip("nginx is not installed; on Debian: apt-get install nginx-light")
    [port] = free_ports(1)
    temporary = "".join(f"{name}_temp_path {folder}/{name};\n" for name in TEMPORARY)
    changes = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "127.0.0.1:8080": server.inference.removeprefix("http://"),
        "/dev/stdout": f"{folder}/access.log",
        "http {": f"http {{\n{temporary}",
    } | changes
    (folder / "nginx.conf").write_text(edited(CONFIG, changes))
    (folder / "tls").mkdir()
    certificate, _ = write_pair(folder / "tls", ("localhost",))
    main = f"daemon off; pid {folder}/pid; {'user root;' if os.geteuid() == 0 else ''}"
    with (folder / "error.log").open("w") as log:
        command = [program, "-c", folder / "nginx.conf", "-e", "stderr", "-g", main]
        process = subprocess.Popen(command, stderr=log, start_new_session=True)
    try:
        wait_until_listening(process, port, folder / "error.log")
        yield Front(port, certificate)
    finally:
        stop(process)


def wait_until_listening(process: subprocess.Popen, port: int, log: Path) -> None:
    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, explain=log.read_text)
