"""The management API of a running TorchServe: description, scaling under traffic, what may be registered, addresses."""

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from src.inference.runtimes import FILES
from src.serving.client import Refused
from src.serving.management import NotReady, Service
from src.serving.scaling import scale, set_workers
from src.serving.store import Store
from tests.conftest import RUNTIME, TIMEOUT, lent
from tests.drawing import encode
from tests.script_run import listening
from tests.sent_inputs import OTHER, PNG
from tests.test_rollout import changed, versions
from tests.waiting import wait_until

CLIENTS = 6
SCALING = 240  # seconds


def test_customized_description(server):
    [description] = requests.get(f"{server.management}/models/fashion_mnist?customized=true", timeout=TIMEOUT).json()
    custom = description["customizedMetadata"]
    with zipfile.ZipFile(server.root / "torchserve" / "model-store" / "fashion_mnist.mar") as archive:
        config = json.loads(archive.read("model_config.json"))
        hashes = {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in ("model.pt", "model_config.json", FILES[RUNTIME])
        }
    assert custom["sha256"] == hashes
    for key in ("class_names", "metrics", "data_hash", "git_commit", "preprocessing", "architecture"):
        assert custom[key] == config[key]
    assert custom["model_version"] == description["modelVersion"] == "1.0"
    assert custom["versions"]["torchserve"] == "0.12.0"
    assert custom["runtime"] == RUNTIME
    assert custom["versions"].keys() == {"onnxruntime", "torchserve", "numpy"}


def test_a_worker_loads_no_torch_that_its_runtime_does_not_use(server):
    mapped = {Path(part.path).name for part in psutil.Process(server.describe()["workers"][0]["pid"]).memory_maps()}
    assert any("onnxruntime" in name for name in mapped)
    assert not any("torch" in name for name in mapped)


def test_this_machine_is_not_asked_through_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert server.predict(PNG).status_code == 200  # the tests do not ask it, either
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name)
    assert Service(management=server.management).describe()["modelVersion"] == "1.0"


def test_the_next_module_finds_the_server_as_this_one_did(server):
    """Whatever a test that failed has left: no version, another one, more workers, a file in the store."""
    service = Service("fashion_mnist", server.inference, server.management, server.metrics)
    store = Store(server.root / "torchserve" / "model-store", "fashion_mnist")
    before = sorted(store.folder.iterdir())
    with lent(server):
        service.manage("/1.0", "DELETE")
    assert versions(service) == {"1.0": True}
    with lent(server):
        service.register(changed(store.served, store.archive_of("2.0"), "2.0", {}).name)
        service.manage("/2.0/set-default", "PUT")
        scale(service, 2)
    assert versions(service) == {"1.0": True}
    with lent(server):
        scale(service, 2)
    assert [worker["status"] for worker in server.describe()["workers"]] == ["READY"]
    assert sorted(store.folder.iterdir()) == before


def test_scaling_under_traffic_fails_no_request(server):
    """1 -> 4 -> 1 workers while clients send: every request gets its own right answer."""
    service = Service(management=server.management, metrics=server.metrics)
    bodies = [PNG, encode(OTHER)]
    expected = [server.predict(body).json()["probabilities"] for body in bodies]
    stop = threading.Event()

    def send_until_stopped(number: int) -> Counter:
        seen: Counter = Counter()
        with requests.Session() as session:
            while not stop.is_set():
                which = (number + seen.total()) % 2
                url = f"{server.inference}/predictions/fashion_mnist"
                response = session.post(url, data=bodies[which], timeout=TIMEOUT)
                right = response.json().get("probabilities") == pytest.approx(expected[which], abs=1e-5)
                seen[response.status_code, right] += 1
        return seen

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(send_until_stopped, number) for number in range(CLIENTS)]
        try:
            for workers in (4, 1):
                assert scale(service, workers) == workers
                assert len(server.describe()["workers"]) == workers
        finally:
            stop.set()
        seen = sum((client.result(timeout=2 * TIMEOUT) for client in clients), Counter())
    assert seen.keys() == {(200, True)}, seen
    assert seen.total() > 2 * CLIENTS  # they went on while workers came and went


def test_workers_that_cannot_load_are_taken_away_again(server, tmp_path):
    """As where memory is too short for them: version 2.0 loads as long as a file is there."""
    service = Service("fashion_mnist", server.inference, server.management, server.metrics)
    store = Store(server.root / "torchserve" / "model-store", "fashion_mnist")
    with lent(server):
        register_fragile(service, store, tmp_path / "loads")
        (tmp_path / "loads").unlink()
        with pytest.raises(NotReady, match=r"died 2 times while it loaded the model; the number of workers is 1 again"):
            scale(service, 3)
        assert service.describe()["minWorkers"] == 1
        assert [worker["status"] for worker in service.describe()["workers"]] == ["READY"]
        service.manage("/2.0?min_worker=3&max_worker=3", "PUT")
        wait_until(lambda: len(service.describe()["workers"]) == 3)
        assert scale(service, 1) == 1
        assert [worker["status"] for worker in service.describe()["workers"]] == ["READY"]


def register_fragile(service: Service, store: Store, needed: Path) -> None:
    """Make the default a version 2.0 whose workers load only where ``needed`` is, and which has one."""
    with zipfile.ZipFile(store.served) as opened:
        handler = opened.read("handler.py").decode()
    begins = "    def initialize(self, context) -> None:\n"
    fragile = handler.replace(begins, f"{begins}        open({str(needed)!r})\n")
    assert fragile != handler
    needed.touch()
    archive = changed(store.served, store.archive_of("2.0"), "2.0", {"handler.py": fragile.encode()})
    service.register(f"{archive.name}&initial_workers=1&synchronous=true")
    service.manage("/2.0/set-default", "PUT")


def test_scaling_goes_on_where_torchserve_stumbles(monkeypatch):
    """The race in TorchServe comes once in hundreds of times, so here stands the answer that was seen of it."""
    lost = Refused('PUT answers 500: NullPointerException: because "job" is null', 500)
    answers, asked = [lost, lost, b"{}", Refused("no such model", 404)], []

    def manage(_, path: str, *_more, **_options) -> bytes:
        asked.append(path)
        answer = answers.pop(0)
        if isinstance(answer, Refused):
            raise answer
        return answer

    monkeypatch.setattr(Service, "manage", manage)
    set_workers(Service(), "1.0", 4, 1)
    assert asked == ["/1.0?min_worker=1&max_worker=1"] * 3
    with pytest.raises(Refused, match="no such model"):
        set_workers(Service(), "1.0", 4, 1)


def test_scale_as_a_command(server):
    """The command of docs/api.md; with one worker already there it has nothing to wait for."""
    command = [sys.executable, "-m", "src.serving.operate", "scale", "--workers", "1",
               "--management", server.management, "--metrics", server.metrics]  # fmt: skip
    done = subprocess.run(command, cwd=server.root, capture_output=True, text=True, timeout=SCALING)
    assert (done.returncode, done.stdout) == (0, "fashion_mnist has 1 worker\n"), done.stderr
    done = subprocess.run([*command, "--model", "none"], cwd=server.root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: GET {server.management}/models/none answers 404: ")
    done = subprocess.run([*command, "--workers", "0"], cwd=server.root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "must be at least 1" in done.stderr


@pytest.mark.parametrize(
    "url",
    ["https://example.com/fashion_mnist.mar", "http://127.0.0.1:1/x.mar", "file:///tmp/x.mar", "s3://bucket/x.mar",
     "../fashion_mnist.mar", "nothing.mar"],
)  # fmt: skip
def test_only_archives_of_the_model_store_can_be_registered(server, url):
    response = requests.post(f"{server.management}/models", params={"url": url}, timeout=TIMEOUT)
    assert response.status_code == 404
    assert response.json()["type"] == "ModelNotFoundException"


def test_registering_twice_is_refused(server):
    response = requests.post(f"{server.management}/models?url=fashion_mnist.mar", timeout=TIMEOUT)
    assert response.status_code == 409
    assert "already registered" in response.json()["message"]


def test_every_port_is_on_loopback(server):
    addresses = listening(server.root)
    ports = {int(address.rsplit(":", 1)[1]) for address in (server.inference, server.management, server.metrics)}
    assert {address.port for address in addresses} >= ports
    assert {address.ip.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}


def test_default_addresses_are_loopback(server):
    lines = (server.root / "torchserve" / "config.properties").read_text().splitlines()
    addresses = {key: value for key, _, value in (line.partition("=") for line in lines) if key.endswith("_address")}
    assert addresses["inference_address"] == "http://127.0.0.1:8080"
    assert addresses["management_address"] == "http://127.0.0.1:8081"
    assert addresses["metrics_address"] == "http://127.0.0.1:8082"
    assert all("127.0.0.1" in value for value in addresses.values())
