"""Clients that send to a server without pause while a test does something to it, and count what came back."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.conftest import TIMEOUT
from tests.sent_inputs import PNG

PAUSE = 0.02  # seconds between a client's requests: what the test does meanwhile needs the cores too


class Traffic:
    """``with Traffic(url) as traffic``: ``clients`` threads POST ``bodies`` in turn until the block ends.

    ``seen`` then counts what each request came to: the model version of a right answer, "wrong", an HTTP status, or
    the name of the exception that ended the connection. A client ends after the first of those.
    """

    def __init__(self, url: str, clients: int = 3, bodies: tuple[bytes, ...] = (PNG,)):
        self.url, self.clients, self.bodies = url, clients, bodies
        self.expected = [answers_in(requests.post(url, data=body, timeout=TIMEOUT)) for body in bodies]
        self.seen: Counter = Counter()
        self._lock, self._stop = threading.Lock(), threading.Event()

    def __enter__(self) -> "Traffic":
        self._pool = ThreadPoolExecutor(self.clients)
        self._running = [self._pool.submit(self._send_until_stopped) for _ in range(self.clients)]
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for client in self._running:
            client.result(timeout=4 * TIMEOUT)
        self._pool.shutdown()

    def restart_counting(self) -> Counter:
        """What was seen so far; ``seen`` begins again, once every request on its way is answered."""
        with self._lock:
            before, self.seen = self.seen, Counter()
        return before

    def wait_for(self, enough: Callable[[Counter], bool], timeout: float = 2 * TIMEOUT) -> None:
        """Until ``enough(seen)``. Fails the test after ``timeout`` seconds."""
        waited = threading.Event()
        for _ in range(int(timeout / 0.05)):
            with self._lock:
                if enough(self.seen):
                    return
            waited.wait(0.05)
        pytest.fail(f"the traffic came only to {self.seen}")

    def _send_until_stopped(self) -> None:
        number = 0
        with requests.Session() as session:
            while not self._stop.is_set():
                which = number % len(self.bodies)
                number += 1
                try:
                    response = session.post(self.url, data=self.bodies[which], timeout=TIMEOUT)
                except (requests.ConnectionError, requests.Timeout) as error:
                    self._count(type(error).__name__)
                    return
                if response.status_code != 200:
                    self._count(response.status_code)
                else:
                    self._count(version_if_right(answers_in(response), self.expected[which]))
                self._stop.wait(PAUSE)

    def _count(self, what) -> None:
        with self._lock:
            self.seen[what] += 1


def answers_in(response: requests.Response) -> list[dict]:
    """The answers of a 200, one for each image."""
    content = response.json()
    return content if isinstance(content, list) else [content]


def version_if_right(answers: list[dict], expected: list[dict]) -> str:
    """The model version that answered, or "wrong"; the size of a batch changes the last digits of a probability."""
    if len(answers) != len(expected):
        return "wrong"
    for answer, wanted in zip(answers, expected, strict=True):
        if answer["probabilities"] != pytest.approx(wanted["probabilities"], abs=1e-5):
            return "wrong"
    return answers[0]["model_version"]
