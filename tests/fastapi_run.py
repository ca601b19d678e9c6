"""FastAPI servers as processes of their own, and what they write and count."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from src.serving.ports import free_ports
from tests.conftest import ROOT, RUNTIME, TIMEOUT
from tests.sent_inputs import BLANK, PNG, as_base64, as_json
from tests.waiting import stop, wait_until, wait_until_answers


@contextmanager
def running(log: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server with these options on a free port, ready: (its address, its process). Stopped at the end."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "src.serving.fastapi_app", "--port", str(port), "--runtime", RUNTIME, *options]
    environment = os.environ | {"TMPDIR": str(log.parent)}  # where the workers of a server count together
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        wait_until_answers(f"http://127.0.0.1:{port}/health", process, log, 2 * TIMEOUT)
        yield f"http://127.0.0.1:{port}", process
    finally:
        stop(process)


def lines_of(log: Path) -> list[dict]:
    """The log, each line parsed."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def line_of(log: Path, request_id: str) -> dict:
    """The one line of a request, which is written after its answer; waits, a bounded time."""
    [line] = wait_until(lambda: [line for line in lines_of(log) if line.get("request_id") == request_id])
    return line


def ready_workers(log: Path) -> list[int]:
    """The PIDs of all that became ready since the start."""
    return [line["pid"] for line in lines_of(log) if line["message"] == "ready"]


def wait_for_ready(log: Path, count: int) -> None:
    wait_until(lambda: len(ready_workers(log)) >= count, 2 * TIMEOUT, log.read_text)


def scrape(url: str) -> dict[tuple[str, str], float]:
    """Value by (metric, its first label that is no host or model)."""
    found = {}
    for name, labels, value in re.findall(
        r"^(\w+)\{(.*)\} (\S+)$", requests.get(f"{url}/metrics", timeout=TIMEOUT).text, re.MULTILINE
    ):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if "le" not in pairs:
            assert pairs.keys() - {"Class", "Reason", "Stage"} <= {"Hostname", "Level", "ModelName", "ModelVersion"}
            found[name, next((pairs[key] for key in ("Class", "Reason", "Stage") if key in pairs), "")] = float(value)
    return found


def check_metrics(url: str) -> None:
    label, doubtful = (
        requests.post(f"{url}/predict", body, timeout=TIMEOUT).json()["predicted_label"] for body in (PNG, BLANK)
    )
    requests.post(f"{url}/predict", b"hello", timeout=TIMEOUT)
    before = scrape(url)
    for body in (PNG, as_json(images=[as_base64(PNG)] * 3), BLANK, b"hello"):
        requests.post(f"{url}/predict", body, timeout=TIMEOUT)
    now = scrape(url)
    wanted = {("Predictions", label): 4, ("RejectedInputs", "not_an_image"): 1, ("Confidence_count", ""): 3}
    wanted |= {("UncertainPredictions", label): 0, ("UncertainPredictions", doubtful): 1}
    wanted |= {("StageSeconds_count", "decode"): 4, ("StageSeconds_count", "inference"): 3, ("Requests4XX", ""): 1}
    assert {key: now[key] - before[key] for key in wanted} == wanted
