"""Waiting for what other processes do, a bounded time."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import requests

from tests.conftest import TIMEOUT


def wait_until(condition: Callable, seconds: float = TIMEOUT, explain: Callable = str):
    """Call ``condition`` until it is true and return what it gave; fail with ``explain()`` when it does not come."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)
    return value


def wait_until_answers(url: str, process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    """Until GET ``url`` gives 2xx; fail with the log when ``process`` ends before."""

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        return is_up(url)

    wait_until(answers, seconds, log.read_text)


def stop(process: subprocess.Popen, seconds: float = TIMEOUT) -> None:
    """SIGTERM to a process with a session of its own, of which nothing is left; TimeoutExpired if it must be killed."""
    process.terminate()
    try:
        process.wait(seconds)
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(seconds)


def is_up(url: str) -> bool:
    """Whether GET ``url`` gives 2xx."""
    try:
        return requests.get(url, timeout=5).ok
    except (requests.ConnectionError, requests.Timeout):
        return False
