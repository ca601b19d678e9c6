"""A real ``mlflow models serve``, as src/serving/mlflow_serving.py starts it, and what tests send to it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests

from src.serving.ports import free_ports
from tests.conftest import TIMEOUT
from tests.drawing import GARMENTS, draw_garment, encode
from tests.sent_inputs import as_base64
from tests.waiting import is_up, stop, wait_until, wait_until_answers

COMMAND = (sys.executable, "-m", "src.serving.mlflow_serving")
GARMENT = [draw_garment(kind, seed) for kind in GARMENTS for seed in range(2)]
FILES = [encode(image) for image in GARMENT]
TEXTS = [as_base64(data) for data in FILES]
PIXELS = np.stack([np.asarray(image)[None] for image in GARMENT])  # uint8 (N, 1, 28, 28)


@contextmanager
def running_server(checkout: Path, store: str, uri: str, log: Path) -> Iterator[str]:
    """The address of ``serve``, which a SIGTERM must end with all its workers."""
    port = free_ports(1)[0]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "serve", "--model-uri", uri, "--port", str(port), "--workers", "2"],
            cwd=checkout,
            env={**os.environ, "MLFLOW_TRACKING_URI": store},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_answers(f"{url}/ping", process, log)
        yield url
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        wait_until(lambda: not is_up(f"{url}/ping"), explain=log.read_text)
    finally:
        stop(process)


def invoke(url: str, **body) -> requests.Response:
    """POST a JSON body to /invocations."""
    return requests.post(f"{url}/invocations", json=body, timeout=TIMEOUT)


def assert_same(answers: list[dict], expected: list[dict]) -> None:
    """Equal but for the version, which each server numbers its own way, and for rounding."""
    assert len(answers) == len(expected)
    for answer, other in zip(answers, expected, strict=True):
        assert answer.keys() == other.keys()
        assert answer["model_version"] == "1"
        for key in ("predicted_class", "predicted_label", "uncertain"):
            assert answer[key] == other[key]
        assert answer["confidence"] == pytest.approx(other["confidence"], abs=1e-5)
        assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
