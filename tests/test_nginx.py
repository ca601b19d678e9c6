"""deploy/nginx/nginx.conf: a real nginx in front of a real TorchServe."""

import gzip
import http.client
import os
import signal
import socket
import ssl
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import BinaryIO

import pytest
import requests

from src.serving.draining import register_without_workers
from src.serving.management import Service, wait_ready
from src.serving.settings import read_properties
from src.serving.tls import pin
from tests.conftest import ROOT, TIMEOUT, Server
from tests.nginx_run import CONFIG, Front, nginx
from tests.sent_inputs import PNG, as_base64, as_json
from tests.waiting import wait_until

HEAD = "POST /predictions/fashion_mnist HTTP/1.1\r\nHost: x\r\n"
LIMIT = 33554432  # bytes
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def front(server, tmp_path_factory) -> Iterator[Front]:
    with nginx(tmp_path_factory.mktemp("nginx"), server, {}) as started:
        yield started


@pytest.fixture(scope="module")
def service(server) -> Service:
    return Service("fashion_mnist", server.inference, server.management, server.metrics)


def is_error(answer: requests.Response, status: int, kind: str) -> bool:
    """Whether ``answer`` is an error of the one form that all errors have."""
    return answer.status_code == status and {"code": status, "type": kind}.items() <= answer.json().items()


# ---- what passes ----


def test_predictions_and_ping_pass(front, server):
    direct = server.predict(PNG).json()
    for sent in (
        {"data": PNG},
        {"files": {"data": PNG}},
        {"data": as_json(image=as_base64(PNG)), "headers": {"Content-Type": "application/json"}},
        {"data": iter([PNG[:100], PNG[100:]])},  # chunked
        {"data": PNG + bytes(2 * MEGABYTE)},
    ):
        answer = front.predict(**sent)
        assert answer.status_code == 200, answer.text
        assert answer.json()["probabilities"] == pytest.approx(direct["probabilities"], abs=1e-5)
    assert front.request("GET", "/ping").json() == {"status": "Healthy"}
    assert "Server" not in answer.headers or answer.headers["Server"] == "nginx"


def test_errors_of_the_model_pass_unchanged(front, server):
    for path, body in (("fashion_mnist", b"no image"), ("unknown", PNG)):
        direct = requests.post(f"{server.inference}/predictions/{path}", data=body, timeout=TIMEOUT)
        answer = front.request("POST", f"/predictions/{path}", body)
        assert (answer.status_code, answer.json()) == (direct.status_code, direct.json())


# ---- what does not ----


UNKNOWN = (  # paths that TorchServe knows, or may take for another
    *("GET /", "OPTIONS /", "GET /api-description", "OPTIONS /api-description", "GET /metrics", "GET /ping/"),
    *("GET /models", "POST /models?url=x.mar", "DELETE /models/fashion_mnist", "GET /workflows"),
    *("POST /workflows?url=x.war", "POST /wfpredict/x", "POST /explanations/fashion_mnist", "POST /invocations"),
    *("GET /v1/models/fashion_mnist", "POST /v1/models/fashion_mnist:predict", "GET /v2/health/live"),
    *("POST /v2/models/fashion_mnist/infer", "POST /predictions/", "POST /predictions/fashion_mnist/9.9"),
    *("POST /predictions/../models", "POST /predictions/..%2fmodels", "POST /predictions/x%2f..%2f..%2fworkflows"),
)
METHODS = ("GET", "PUT", "DELETE", "OPTIONS", "PATCH")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        *((line, 404) for line in UNKNOWN),
        *((f"{method} /predictions/fashion_mnist", 405) for method in METHODS),
        *((f"{method} /ping", 405) for method in ("POST", "DELETE", "OPTIONS")),
        *((line, 400) for line in ("OPTIONS *", "POST /predictions/x%00", "GET http://[")),
    ],
)
def test_nothing_else_passes(line, status, front):
    said = front.send(f"{line} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    head, _, body = said.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, said
    assert b"application/json" in head
    assert body.startswith(b'{"code":'), said


def test_what_is_asked_for_goes_on_in_its_plain_form(front):
    """A path that means another one, and a query, reach TorchServe as the name alone."""
    request = "POST /workflows/../predictions/%66ashion_mnist?url=x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    said = front.send(f"{request}Content-Length: {len(PNG)}\r\n\r\n".encode() + PNG)
    assert said.startswith(b"HTTP/1.1 200"), said


@pytest.mark.parametrize("header", ["chunked, identity", "xchunked", "chunked\r\nContent-Length: 4"])
def test_a_request_that_two_servers_would_read_differently_is_refused(header, front):
    """What Netty 4.1.53 would take for two requests."""
    inner = b"0\r\n\r\nGET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    said = front.send(f"{HEAD}Transfer-Encoding: {header}\r\n\r\n".encode() + inner)
    assert said.count(b"HTTP/1.1 ") == 1, said
    assert int(said.split()[1]) in (400, 501), said


def test_the_body_limit_is_torchserves(front):
    settings = read_properties((ROOT / "torchserve" / "config.properties").read_text(), "the file")
    assert settings["max_request_size"] == settings["max_response_size"] == str(LIMIT)
    assert f"client_max_body_size {LIMIT};" in CONFIG.read_text()
    assert front.predict(PNG + bytes(LIMIT - len(PNG))).status_code == 200
    said = front.send(f"{HEAD}Connection: close\r\nContent-Length: {LIMIT + 1}\r\n\r\n".encode())
    assert said.startswith(b"HTTP/1.1 413"), said
    assert b'{"code":413,"type":"body_too_large","message":"' in said


def test_a_worker_that_dies_is_a_5xx(front, server, service):
    """TorchServe's own answer: the client is not to blame, and may send again."""
    workers = [worker["pid"] for worker in server.describe()["workers"]]
    with ThreadPoolExecutor(40) as pool:
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        try:
            sent = []

            def one_waits() -> int:  # then an earlier one is in the worker
                sent.append(pool.submit(front.predict, files={"data": PNG}))
                return server.describe()["jobQueueStatus"]["pendingRequests"]

            wait_until(one_waits)
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        answers = [one.result(timeout=4 * TIMEOUT) for one in sent]
    died = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(died) < len(answers)
    for answer in died:
        assert answer.status_code in (500, 507)  # 507: while the Java was short of memory
        assert answer.json() == {
            "code": answer.status_code,
            "type": "InternalServerException",
            "message": "Worker died.",
        }
    wait_ready(service, 4 * TIMEOUT)


def test_a_compressed_body_is_not_unpacked(front, server):
    """So none of Netty's decompressors, with their holes, is ever asked."""
    for kind in ("gzip", "deflate", "br", "snappy"):
        packed = gzip.compress(PNG) if kind == "gzip" else zlib.compress(PNG)
        for answer in (
            server.predict(packed, headers={"Content-Encoding": kind}),
            front.predict(packed, headers={"Content-Encoding": kind}),
        ):
            assert is_error(answer, 400, "not_an_image")


# ---- load ----


def test_many_large_bodies_are_taken_a_few_at_a_time(front, server):
    """The others are asked to come again, before TorchServe reads them."""
    body = PNG + bytes(31 * MEGABYTE)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: front.predict(body), range(10)))
    seen = Counter(answer.status_code for answer in answers)
    print(f"\nanswers: {dict(seen)}")
    assert seen.keys() <= {200, 503}
    assert seen[200] >= 2
    for answer in answers:
        if answer.status_code == 503:
            assert is_error(answer, 503, "unavailable")
            assert answer.headers["Retry-After"] == "1"
    assert server.predict(PNG).status_code == 200


def test_a_503_of_torchserve_says_when_to_come_again(front, server, service):
    idle = replace(service, model="idle")
    register_without_workers(idle, server.root / "torchserve" / "model-store")
    try:
        answer = front.request("POST", "/predictions/idle", PNG)
    finally:
        idle.manage("", "DELETE")
    assert is_error(answer, 503, "ServiceUnavailableException")
    assert answer.headers["Retry-After"] == "1"
    assert "Retry-After" not in front.predict(PNG).headers


def test_one_client_does_not_take_all(server, tmp_path):
    few = {"rate=200r/s": "rate=1r/m", "burst=400": "burst=3"}
    with nginx(tmp_path, server, few) as strict:
        answers = [strict.predict(PNG) for _ in range(8)]
        ping = strict.request("GET", "/ping")
    assert Counter(answer.status_code for answer in answers) == {200: 4, 429: 4}
    for answer in (answers[-1], ping):
        assert is_error(answer, 429, "too_many_requests")
        assert answer.headers["Retry-After"] == "1"


def test_one_client_has_few_requests_at_a_time(server, tmp_path):
    """Two that are still being sent take both places."""
    few = {"limit_conn connections 100": "limit_conn connections 2"}
    with nginx(tmp_path, server, few) as strict, ExitStack() as stack:
        for _ in range(2):
            begun = stack.enter_context(strict.connect())
            begun.sendall(f"{HEAD}Content-Length: 200000\r\nExpect: 100-continue\r\n\r\n".encode())
            assert begun.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"  # it has its place
        assert is_error(strict.predict(PNG), 429, "too_many_requests")
        assert is_error(strict.request("GET", "/ping"), 429, "too_many_requests")


def test_slow_clients_are_ended_and_hold_no_place(server, tmp_path):
    """More than nginx sends on at once; they stop within the headers or within the body."""
    head = f"{HEAD}Content-Length: 200000\r\n\r\n".encode()
    quick = {f"client_{part}_timeout 10s": f"client_{part}_timeout 1s" for part in ("header", "body")}
    with nginx(tmp_path, server, quick) as impatient, ExitStack() as stack:
        slow = [stack.enter_context(impatient.connect()) for _ in range(30)]
        for number, connection in enumerate(slow):
            connection.sendall(head[:40] if number % 2 else head + PNG)
        assert impatient.predict(PNG + bytes(200_000)).status_code == 200
        for connection in slow:
            assert connection.recv(100)[:12] in (b"HTTP/1.1 408", b"")


def test_a_request_is_sent_once(tmp_path):
    """Also where a connection that was kept open ends under it: nginx would try a new one."""
    seen = []

    def serve(listener: socket.socket) -> None:
        """Answer the first request, and close the connection at every later one."""
        with suppress(OSError):  # the listener is closed
            while True:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as stream:
                    while read_request(stream, seen) and len(seen) == 1:
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        upstream = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", "", "", ROOT)
        threading.Thread(target=serve, args=[listener], daemon=True).start()
        with nginx(tmp_path, upstream, {"worker_processes auto": "worker_processes 1"}) as front:
            assert front.request("GET", "/ping").status_code == 200
            answers = [front.request("GET", "/ping"), front.predict(PNG)]
        listener.shutdown(socket.SHUT_RDWR)
    for answer in answers:
        assert is_error(answer, 503, "unavailable")
    assert seen == ["GET", "GET", "POST"]


def read_request(stream: BinaryIO, seen: list[str]) -> bool:
    """Whether one came; its method is then the last in ``seen``."""
    if not (line := stream.readline()):
        return False
    headers = http.client.parse_headers(stream)
    stream.read(int(headers.get("Content-Length", 0)))
    seen.append(line.split()[0].decode())
    return True


def test_a_server_that_is_away_is_a_503(server, tmp_path):
    with nginx(tmp_path, server, {server.inference.removeprefix("http://"): "127.0.0.1:1"}) as lonely:
        answers = [lonely.predict(PNG), lonely.request("GET", "/ping")]
    for answer in answers:
        assert is_error(answer, 503, "unavailable")
        assert answer.headers["Retry-After"] == "1"


# ---- TLS ----


def test_tls_is_asked_for_and_old_ones_are_refused(front):
    plain = requests.get(f"http://localhost:{front.port}/ping", timeout=TIMEOUT)
    assert is_error(plain, 400, "bad_request")
    with front.connect() as connection:
        assert connection.version() == "TLSv1.3"
    old = pin(front.certificate)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", front.port), TIMEOUT) as connection,
        pytest.raises(ssl.SSLError, match=r"ALERT|VERSION|PROTOCOL"),
    ):
        old.wrap_socket(connection)
