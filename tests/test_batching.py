"""torchserve/java/BatchAggregator.java: a worker takes what waits, and waits for nothing."""

import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import yaml

from tests.conftest import ROOT, TIMEOUT
from tests.waiting import wait_until

BATCH = 4
# Answers with the size of the batch and the number of batches so far. A body is a file that must be there first;
# "stream" is answered in two parts.
HANDLER = f"""
import json, time
from pathlib import Path
from ts.handler_utils.utils import send_intermediate_predict_response
calls = 0

def handle(data, context):
    global calls
    if data is None:
        return None
    calls += 1
    for request in data:
        name = request.get("body", b"").decode()
        if name == "stream":
            send_intermediate_predict_response(["first, "], context.request_ids, "", 200, context)
            return ["last"]
        if name:
            Path(name + ".asked").touch()
            deadline = time.monotonic() + {TIMEOUT}
            while not Path(name).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
    return [json.dumps({{"size": len(data), "call": calls}})] * len(data)
"""


class Batches:
    """A model of one name that counts its batches."""

    def __init__(self, server):
        self.url, self.described = f"{server.inference}/predictions/batches", f"{server.management}/models/batches"
        self.clients = ThreadPoolExecutor(16)

    def ask(self, body: bytes = b"") -> dict:
        answer = requests.post(self.url, data=body, headers={"Content-Type": "text/plain"}, timeout=TIMEOUT)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def describe(self, customized: bool = False) -> dict:
        query = {"customized": "true"} if customized else None
        [found] = requests.get(self.described, params=query, timeout=TIMEOUT).json()
        return found

    def queue(self, ask, *arguments) -> Future:
        """Ask in a thread; returns once the request waits in the queue behind those before."""
        before = self.describe()["jobQueueStatus"]["pendingRequests"]
        answer = self.clients.submit(ask, *arguments)
        wait_until(lambda: self.describe()["jobQueueStatus"]["pendingRequests"] == before + 1)
        return answer

    def keep_busy(self, door: Path) -> Future:
        """Give the one worker a request that it answers when there is a file ``door``."""
        answer = self.clients.submit(self.ask, str(door).encode())
        wait_until(door.with_name(f"{door.name}.asked").exists)
        return answer


@pytest.fixture(scope="module")
def batches(server) -> Iterator[Batches]:
    """One worker, batches of BATCH, and a delay that TorchServe's own batching would outlast no client with."""
    settings = yaml.safe_load((ROOT / "torchserve" / "model-config.yaml").read_text())
    settings |= {"batchSize": BATCH, "maxBatchDelay": 10 * TIMEOUT * 1000}
    model = {"modelName": "batches", "modelVersion": "1.0", "handler": "counting.py"}
    with zipfile.ZipFile(server.root / "torchserve" / "model-store" / "batches.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model | {"configFile": "model-config.yaml"}}))
        archive.writestr("counting.py", HANDLER)
        archive.writestr("model-config.yaml", yaml.safe_dump(settings))
    query = {"url": "batches.mar", "initial_workers": 1, "synchronous": "true"}
    registered = requests.post(f"{server.management}/models", params=query, timeout=4 * TIMEOUT)
    assert registered.status_code == 200, registered.text
    yield Batches(server)
    requests.delete(f"{server.management}/models/batches", timeout=TIMEOUT).raise_for_status()


def test_a_lone_request_waits_for_no_other(batches):
    assert [batches.ask()["size"] for _ in range(3)] == [1, 1, 1]


def test_what_waits_is_one_batch(batches, tmp_path):
    busy = batches.keep_busy(tmp_path / "door")
    waiting = [batches.queue(batches.ask) for _ in range(BATCH + 2)]
    (tmp_path / "door").touch()
    assert busy.result()["size"] == 1
    assert [answer.result()["size"] for answer in waiting] == [BATCH] * BATCH + [2] * 2


def test_a_description_is_asked_for_alone_and_once(batches, tmp_path):
    busy = batches.keep_busy(tmp_path / "door")
    before = [batches.queue(batches.ask) for _ in range(2)]
    description = batches.queue(batches.describe, True)
    after = batches.queue(batches.ask)
    (tmp_path / "door").touch()
    first = busy.result()["call"]
    assert [answer.result() for answer in before] == [{"size": 2, "call": first + 1}] * 2
    assert description.result()["customizedMetadata"] == {"size": 1, "call": first + 2}
    assert after.result() == {"size": 1, "call": first + 3}
    assert batches.ask()["call"] == first + 4


def test_the_requests_of_clients_that_are_gone_are_not_computed(batches, tmp_path):
    busy = batches.keep_busy(tmp_path / "door")
    for _ in range(BATCH):
        with pytest.raises(requests.ReadTimeout):
            requests.post(batches.url, data=b"", timeout=0.5)
    after = batches.queue(batches.ask)
    (tmp_path / "door").touch()
    assert after.result() == {"size": 1, "call": busy.result()["call"] + 1}


def test_an_answer_in_parts_is_whole(batches):
    answer = requests.post(batches.url, data=b"stream", headers={"Content-Type": "text/plain"}, timeout=TIMEOUT)
    assert (answer.status_code, answer.text) == (200, "first, last")
    assert batches.ask()["size"] == 1


def test_a_lone_request_is_answered_while_other_workers_wait(batches):
    requests.put(batches.described, params={"min_worker": 3, "synchronous": "true"}, timeout=4 * TIMEOUT)
    assert [batches.ask()["size"] for _ in range(6)] == [1] * 6
