"""What breaks servers, done to a running one: it goes on, or comes back, and what it costs is counted."""

import http.client
import json
import os
import re
import resource
import selectors
import signal
import socket
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import psutil
import pytest
import requests
from PIL import Image

from src.export.archive import ArchiveError
from src.serving.client import Refused, call, send
from src.serving.management import Service, wait_ready
from src.serving.rollout import deploy
from src.serving.store import Store
from src.serving.watching import Watch
from tests.conftest import TIMEOUT
from tests.drawing import encode, png_chunk
from tests.sent_inputs import PNG, as_base64, as_json
from tests.test_archive_refusals import rewrite, sign
from tests.waiting import wait_until

QUEUE = 1000  # job_queue_size of torchserve/config.properties
RAW = "application/octet-stream"
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def service(server) -> Service:
    return Service("fashion_mnist", server.inference, server.management, server.metrics)


@pytest.fixture(scope="module")
def url(server) -> str:
    return f"{server.inference}/predictions/fashion_mnist"


@pytest.fixture(scope="module", autouse=True)
def _many_connections():
    """Room for more than a thousand of them in this process."""
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(autouse=True)
def _right_before_and_after(server, service):
    """The server answers rightly after each of these tests as before it."""
    wanted = server.predict(PNG).json()["probabilities"]
    yield
    wait_ready(service, 4 * TIMEOUT)
    assert server.predict(PNG).json()["probabilities"] == pytest.approx(wanted, abs=1e-5)


def address(server) -> tuple[str, int]:
    host, port = server.inference.removeprefix("http://").split(":")
    return host, int(port)


def head(length: int) -> bytes:
    """The headers of a raw request with a body of ``length`` bytes."""
    return f"POST /predictions/fashion_mnist HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_killed_worker_comes_back_and_a_client_that_sends_again_loses_nothing(server, url):
    """kill -9 under load: whoever is in the worker's batch gets a 5xx, and is answered when it asks once more."""
    killed, stop, seen, lock = server.describe()["workers"][0]["pid"], threading.Event(), Counter(), threading.Lock()

    def send_until_stopped(again: bool) -> None:
        while not stop.wait(0.02):
            try:
                (send if again else call)(url, PNG, RAW, timeout=4 * TIMEOUT)
                outcome = 200
            except Refused as error:
                outcome = error.status
            with lock:
                seen[again, outcome] += 1

    def replaced() -> bool:
        return [(w["status"], w["pid"] != killed) for w in server.describe()["workers"]] == [("READY", True)]

    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(send_until_stopped, number % 2 == 0) for number in range(8)]
        try:
            time.sleep(0.5)
            os.kill(killed, signal.SIGKILL)
            wait_until(replaced, 4 * TIMEOUT, server.describe)
            time.sleep(0.5)
        finally:
            stop.set()
        for client in running:
            client.result(timeout=4 * TIMEOUT)
    print(f"\nby (sends again, status): {dict(seen)}")
    assert {status for again, status in seen if again} == {200}
    assert {status for again, status in seen if not again} <= {200, 500, 503, 507}
    assert sum(count for (again, status), count in seen.items() if status != 200) <= 4  # one a client that does not


def test_a_full_queue_refuses_at_once_and_recovers(server):
    """The worker stands still; the queue takes what it can, the rest gets 503, and all that was taken is answered."""
    excess = 200  # more than a batch
    worker = psutil.Process(server.describe()["workers"][0]["pid"])
    with ExitStack() as stack, selectors.DefaultSelector() as answered:
        for _ in range(QUEUE + excess):
            client = stack.enter_context(socket.create_connection(address(server), TIMEOUT))
            answered.register(client, selectors.EVENT_READ)
        clients = [key.fileobj for key in answered.get_map().values()]
        worker.suspend()
        try:
            for client in clients:
                client.sendall(head(len(PNG)) + PNG)
            assert answered.select(TIMEOUT), "nobody was refused while the queue was full"
            memory = worker.parent().memory_info().rss
        finally:
            worker.resume()
        seen = Counter(read_status(client) for client in clients)
    print(f"\nanswers: {dict(seen)}; the Java server has {memory / MEGABYTE:.0f} MB")
    assert seen.keys() == {200, 503}
    assert seen[200] >= QUEUE
    assert seen[503] > 0
    assert memory < 1200 * MEGABYTE  # -Xmx768m and what lies beside the heap


def read_status(client: socket.socket) -> int:
    response = http.client.HTTPResponse(client)
    response.begin()
    response.read()
    return response.status


@pytest.mark.parametrize(("clients", "megabytes"), [(64, 4), (16, 31)])
def test_large_bodies_are_answered_or_refused(server, url, clients, megabytes):
    """More than the heap holds at once: TorchServe alone ended at it."""
    workers, body = server.describe()["workers"], PNG + bytes(megabytes * MEGABYTE)
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda _: requests.post(url, body, timeout=4 * TIMEOUT), range(2 * clients)))
    seen = Counter(answer.status_code for answer in answers)
    print(f"\nanswers: {dict(seen)}")
    assert seen.keys() <= {200, 503}
    assert seen[200] > 0
    for answer in answers:
        if answer.status_code == 503:
            assert "send this one again in a second" in answer.json()["message"]
    assert [worker["pid"] for worker in server.describe()["workers"]] == [worker["pid"] for worker in workers]


def test_idle_and_slow_clients_do_not_keep_others_waiting(server):
    """1,000 connections that say nothing and 50 that send a byte a second, five of the headers and five of the body:
    other clients are answered meanwhile."""
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection(address(server), TIMEOUT))
        slow = [stack.enter_context(socket.create_connection(address(server), TIMEOUT)) for _ in range(50)]
        request, begun = head(len(PNG)) + PNG, len(head(len(PNG))) - 5
        for client in slow:
            client.sendall(request[:begun])
        for byte in request[begun : begun + 10]:
            for client in slow:
                client.sendall(bytes([byte]))
            assert server.predict(PNG).status_code == 200
            time.sleep(1)
        with selectors.DefaultSelector() as selector:
            for client in slow:
                selector.register(client, selectors.EVENT_READ)
            assert selector.select(timeout=0) == []  # none was answered or cut off yet
        for client in slow:
            client.sendall(request[begun + 10 :])
        assert Counter(read_status(client) for client in slow) == {200: 50}


@cache
def decompression_bombs() -> dict[str, bytes]:
    """PNGs of some 100 kB that would unpack to 100 MB: as text, as a profile, and as pixels that the header denies."""
    bomb, start = zlib.compress(b"\0" * 100 * MEGABYTE, 9), PNG.index(b"IDAT") - 4
    header = PNG[:start]
    return {
        "text": header + png_chunk(b"zTXt", b"x\0\0" + bomb) + PNG[start:],
        "international text": header + png_chunk(b"iTXt", b"x\0\1\0\0\0" + bomb) + PNG[start:],
        "profile": header + png_chunk(b"iCCP", b"x\0\0" + bomb) + PNG[start:],
        "pixels": header + png_chunk(b"IDAT", bomb) + png_chunk(b"IEND", b""),
    }


@pytest.mark.parametrize("name", ["text", "international text", "profile", "pixels"])
def test_a_decompression_bomb_is_not_unpacked(server, url, name):
    body = decompression_bombs()[name]
    worker = psutil.Process(server.describe()["workers"][0]["pid"])
    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # the peak begins again
    before = peak_memory(worker.pid)
    with ThreadPoolExecutor(8) as clients:
        statuses = {response.status_code for response in clients.map(lambda _: server.predict(body), range(8))}
    assert statuses <= {200, 400}
    assert peak_memory(worker.pid) < before + 64 * MEGABYTE
    assert worker.is_running()


def peak_memory(pid: int) -> int:
    """The most bytes that a process had in memory: what it took and gave back is in them."""
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1])


def test_many_large_images_do_not_keep_a_worker_until_it_is_ended(server, url):
    """64 images of 19 million pixels each, 90 kB as PNG: together a minute of decoding, twice responseTimeout."""
    image = as_base64(encode(Image.new("RGBA", (4400, 4400)), "PNG"))
    worker = server.describe()["workers"][0]["pid"]
    with ThreadPoolExecutor(2) as clients:
        large = clients.submit(server.predict, as_json(images=[image] * 64))
        small = clients.submit(server.predict, PNG)
        assert small.result().status_code == 200
        answer = large.result()
    # A machine that is fast enough answers them all.
    assert answer.status_code == 200 or (answer.status_code, answer.json()["type"]) == (503, "busy"), answer.text
    assert server.describe()["workers"][0]["pid"] == worker


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"../evil.py": b""}, "leads out of its folder"),
        ({"/etc/evil.py": b""}, "leads out of its folder"),
        ({"MAR-INF/MANIFEST.json": json.dumps({"model": {"handler": "../../evil.py"}}).encode()}, "names handler"),
        ({"MAR-INF/MANIFEST.json": json.dumps({"model": {"handler": "/etc/evil.py"}}).encode()}, "names handler"),
        ({"model_config.json": b'{"class_names": 3}'}, "is damaged"),
        ({"model.pt": None}, r"misses model\.pt"),
    ],
)
def test_what_must_not_be_served_is_refused_before_the_server_hears_of_it(server, tmp_path, content, said):
    store = Store(server.root / "torchserve" / "model-store", "fashion_mnist")
    archive = rewrite(store.folder / "fashion_mnist.mar", tmp_path / "x.mar", content)
    before, nobody = sorted(store.folder.iterdir()), Service(management="http://127.0.0.1:1")
    with pytest.raises(ArchiveError, match=said):
        deploy(nobody, archive, store, [], Watch(0), print)
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(ArchiveError, match="was changed: its SHA-256 is"):
        deploy(nobody, archive, store, [], Watch(0), print)
    with pytest.raises(ArchiveError, match="is damaged"):
        deploy(nobody, sign(archive), store, [], Watch(0), print)
    assert sorted(store.folder.iterdir()) == before


def test_without_a_server_the_client_says_so(server):
    with pytest.raises(OSError, match=r"POST http://127\.0\.0\.1:1/predictions/fashion_mnist: .*refused"):
        send("http://127.0.0.1:1/predictions/fashion_mnist", PNG)
    with pytest.raises(Refused, match=r"answers 404: .*Model not found: nothing"):
        send(f"{server.inference}/predictions/nothing", PNG)
    with pytest.raises(Refused) as refused:
        send(f"{server.inference}/predictions/fashion_mnist", b"no image", RAW)
    assert refused.value.status == 400
    assert requests.get(f"{server.inference}/ping", timeout=TIMEOUT).json()["status"] == "Healthy"
