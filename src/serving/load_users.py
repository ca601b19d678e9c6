"""Send requests at a constant rate with locust, and note each answer.

locust patches the standard library when it is imported; with its FastHttpUser that is not needed, so it is told not
to, and imported when a test runs and not before.
"""

import itertools
import json
import os
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from src.serving.load_requests import Shot, find_fault
from src.serving.processes import family, memory, processor_seconds
from src.serving.tls import client_context

USERS = 50  # so that one slow answer in fifty does not lower the rate
TIMEOUT = 10.0  # seconds until a request without an answer is given up
SAMPLING = 1.0  # seconds between two looks at the server's processes


@dataclass(frozen=True)
class Answer:
    """``at``: seconds since the start; ``seconds``: until the answer was there; ``fault``: empty when it was right;
    ``hit``: whether the predicted class was the true one, None when that is not known."""

    at: float
    seconds: float
    form: str
    fault: str
    hit: bool | None = None


@dataclass
class Usage:
    """What the server's processes used while requests came in: lists with one value a sample; empty when unseen."""

    cpu: list[float] = field(default_factory=list)  # share of the whole machine, 0 to 1
    bytes: list[int] = field(default_factory=list)  # PSS


class UsageSampler(threading.Thread):
    """Looks at a server's processes once in SAMPLING seconds until ``stop`` is called."""

    def __init__(self, server: psutil.Process):
        super().__init__(daemon=True)
        self.server, self.usage, self.ended = server, Usage(), threading.Event()

    def run(self) -> None:
        processes = family(self.server)
        before, then = processor_seconds(processes), time.monotonic()
        while not self.ended.wait(SAMPLING):
            processes = family(self.server)
            after, now = processor_seconds(processes), time.monotonic()
            used = sum(seconds - before.get(pid, 0) for pid, seconds in after.items())
            self.usage.cpu.append(used / (now - then) / psutil.cpu_count())
            self.usage.bytes.append(memory(processes))
            before, then = after, now

    def stop(self) -> Usage:
        self.ended.set()
        self.join(TIMEOUT)
        return self.usage


def run_users(
    url: str, shots: Iterator[Shot], rate: float, duration: float, token: str, server: psutil.Process | None
) -> tuple[list[Answer], Usage]:
    """POST ``rate`` requests a second to ``url`` for ``duration`` seconds; every answer and the server's usage."""
    os.environ["LOCUST_SKIP_MONKEY_PATCH"] = "1"
    import gevent.ssl
    from locust import FastHttpUser, constant_throughput, task
    from locust.env import Environment

    def trust(cafile: str | None = None) -> ssl.SSLContext:  # locust would add the authorities of ``cafile``
        return client_context(gevent.ssl.SSLContext) or gevent.ssl.create_default_context()

    users = min(USERS, max(1, int(rate)))
    numbers = itertools.count()
    answers: list[Answer] = []
    start = time.perf_counter()

    class Client(FastHttpUser):
        host = url
        wait_time = constant_throughput(rate / users)
        connection_timeout = network_timeout = TIMEOUT
        insecure = client_context() is not None  # the host's name is not compared; the certificate always is
        ssl_context_factory = staticmethod(trust)

        def on_start(self):
            gevent.sleep(next(numbers) / rate)  # one after the other, not all at once

        def on_stop(self):
            self.client.client.close()

        @task
        def predict(self):
            shot = next(shots)
            headers = {"Content-Type": shot.content_type} | ({"Authorization": f"Bearer {token}"} if token else {})
            begin = time.perf_counter()
            with self.client.post(url, data=shot.body, headers=headers, catch_response=True) as answer:
                seconds, body = time.perf_counter() - begin, answer.content or b""
                fault = find_fault(shot, answer.status_code or 0, body)
                known = not shot.bad and not fault and shot.label >= 0
                hit = json.loads(body)["predicted_class"] == shot.label if known else None
                answers.append(Answer(begin - start, seconds, shot.form, fault, hit))
                answer.failure(fault) if fault else answer.success()

    sampler = UsageSampler(server) if server else None
    if sampler:
        sampler.start()
    runner = Environment(user_classes=[Client]).create_local_runner()
    runner.environment.stop_timeout = TIMEOUT
    start = time.perf_counter()
    runner.start(users, spawn_rate=users)
    gevent.sleep(duration)
    runner.quit()
    return answers, sampler.stop() if sampler else Usage()
