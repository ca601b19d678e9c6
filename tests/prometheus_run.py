"""deploy/prometheus as it is, on another port and faster, reading a server of the tests."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from src.serving.ports import free_ports
from tests.conftest import ROOT, TIMEOUT, edited
from tests.waiting import stop, wait_until, wait_until_answers

FOLDER = ROOT / "deploy" / "prometheus"


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def query(self, expression: str) -> list[dict]:
        """The samples that ``expression`` gives now, each with its ``metric`` (labels) and ``value``."""
        answer = requests.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=TIMEOUT).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def total(self, metric: str) -> float:
        """The sum over the series of ``metric``; 0 where there is none."""
        return sum(float(sample["value"][1]) for sample in self.query(metric))

    def wait_for(self, expression: str) -> float:
        """The value of the first sample that ``expression`` gives, when there is one."""
        [sample, *_] = wait_until(lambda: self.query(expression), 2 * TIMEOUT, lambda: f"nothing from {expression}")
        return float(sample["value"][1])


def find(program: str) -> str:
    """The path of ``prometheus`` or ``promtool``; the test is skipped where they are missing."""
    path = shutil.which(program)
    if not path:
        pytest.skip(f"{program} is not installed; on Debian: apt-get install prometheus")
    return path


@contextmanager
def prometheus(folder: Path, changes: dict[str, str]) -> Iterator[Prometheus]:
    """The shipped configuration with ``changes``, each of a text that must be in it; it looks every second."""
    program, (port,) = find("prometheus"), free_ports(1)
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    changes = {"interval: 5s": "interval: 1s", "interval: 15s": "interval: 1s"} | changes
    (folder / "prometheus.yml").write_text(edited(FOLDER / "prometheus.yml", changes))
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_answers(f"http://127.0.0.1:{port}/-/ready", process, folder / "log")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        stop(process)
