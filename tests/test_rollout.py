"""Deploy, go back, crash, start again, full disk, stop under traffic: on a TorchServe of its own."""

import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import requests
import torch
import yaml

from src.export.archive import ArchiveError, checksum_path
from src.serving.golden import DEFAULT_GOLDEN, load_golden
from src.serving.management import Service, status
from src.serving.ports import free_ports
from src.serving.rollout import RolloutError, deploy, roll_back
from src.serving.scaling import DRAINING
from src.serving.store import Store
from src.serving.watching import Watch
from tests.conftest import ROOT, TIMEOUT, copy_checkout, run_script
from tests.drawing import encode
from tests.script_run import Run, pid_of, wait_until_none
from tests.sent_inputs import PICTURE, PNG, as_base64, as_json
from tests.test_archive_refusals import rewrite
from tests.traffic import Traffic
from tests.waiting import wait_until

WATCH = 1.0  # seconds
LOGS = ("torchserve.log", "console.log")
PAGE = 4096  # bytes that a file takes of the file system at a time
SERVING_PYTHON = "torchserve/.venv/bin/python"
TWO = as_json(images=[as_base64(PNG)] * 2)
GOLDEN = load_golden(ROOT / DEFAULT_GOLDEN)
CALM = r"\d+ requests of others, 0\.00% got 5xx, 0\.00% got 4xx, \d+ ms on average"  # what a rollout says of a version
SLOW = encode(PICTURE.resize((4000, 4000)), "JPEG")  # takes a worker some 13 ms: it is decoded at a reduced size


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Run:
    """A server that may be killed; its logs lie on a file system of 1 MB where we may mount one."""
    run = Run(copy_checkout(tmp_path_factory.mktemp("own")), free_ports(3), dict(os.environ))
    logs = run.root / "torchserve" / ".run" / "logs"
    logs.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(logs)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, timeout=60).returncode == 0
    try:
        run.start("--native")
        yield run
    finally:
        run.script("--stop")
        if mounted:
            subprocess.run(["umount", "--lazy", str(logs)], check=True, timeout=60)


@pytest.fixture(scope="module")
def service(own) -> Service:
    inference, management, metrics = (f"http://127.0.0.1:{port}" for port in own.ports)
    return Service("fashion_mnist", inference, management, metrics)


@pytest.fixture(scope="module")
def url(service) -> str:
    return f"{service.inference}/predictions/fashion_mnist"


@pytest.fixture(scope="module")
def store(own) -> Store:
    return Store(own.root / "torchserve" / "model-store", "fashion_mnist")


@pytest.fixture(scope="module")
def second(own) -> Path:
    """An archive of the same model with version 2.0."""
    done = run_script(own.root, "./create_mar_archive.sh", "--version", "2.0", "--output", "new", PYTHON=SERVING_PYTHON)
    assert done.returncode == 0, done.stderr
    return own.root / "new" / "fashion_mnist.mar"


@pytest.fixture
def undeployed(service, store) -> None:
    """Version 1.0 serves, as after a first start."""
    if store.deployed():
        roll_back(service, store, print)
    assert versions(service) == {"1.0": True}


@pytest.fixture
def deployed(service, second, store) -> None:
    """Version 2.0 serves in its place."""
    if not store.deployed():
        deploy(service, second, store, GOLDEN, Watch(0), print)
    assert versions(service) == {"2.0": True}


def changed(archive: Path, target: Path, version: str, changes: dict[str, bytes]) -> Path:
    """``archive`` with another version and other files, sealed as if it were right."""
    with zipfile.ZipFile(archive) as opened:
        manifest = json.loads(opened.read("MAR-INF/MANIFEST.json"))
    manifest["model"]["modelVersion"] = version
    return rewrite(archive, target, changes | {"MAR-INF/MANIFEST.json": json.dumps(manifest).encode()})


def operate(own: Run, command: str, *arguments) -> subprocess.CompletedProcess:
    """``python -m src.serving.operate`` on the serving environment, as run_torchserve.sh calls it."""
    ports = zip(("--inference", "--management", "--metrics"), own.ports, strict=True)
    addresses = [text for option, port in ports for text in (option, f"http://127.0.0.1:{port}")]
    return run_script(own.root, SERVING_PYTHON, "-m", "src.serving.operate", command, *map(str, arguments), *addresses)


def versions(service: Service) -> dict[str, bool]:
    """The registered versions and whether each is the default."""
    return {version["version"]: version["default"] for version in status(service)["versions"]}


# ---- deploy and back ----


@pytest.mark.usefixtures("undeployed")
def test_a_good_version_is_deployed_without_a_failed_request(own, service, url, second, store):
    with Traffic(url) as traffic:
        done = operate(own, "deploy", second, "--watch", WATCH)
        assert done.returncode == 0, done.stdout + done.stderr
        during = traffic.restart_counting()
        traffic.wait_for(lambda seen: seen.total() > 4 * traffic.clients)
        traffic.restart_counting()  # what was on its way has been counted
        traffic.wait_for(lambda seen: seen.total() > 4 * traffic.clients)
    assert during.keys() == {"1.0", "2.0"}, during
    assert traffic.seen.keys() == {"2.0"}, traffic.seen
    steps = [r"verified .*: version 2\.0, sha256 \w{64}", r"version 2\.0 is registered and has 1 READY worker",
             r"golden set: 12 of 12 right, before 12; 100% of the labels as before, .*", r"version 2\.0 is the default",
             rf"version 1\.0: {CALM}", rf"version 2\.0: {CALM}; 0\.0% of \d+ answers uncertain",
             r"version 1\.0 is unregistered", r"fashion_mnist 2\.0 serves"]  # fmt: skip
    for line, step in zip(done.stdout.splitlines(), steps, strict=True):
        assert re.fullmatch(step, line), line
    assert versions(service) == {"2.0": True}
    assert store.deployed() == ["fashion_mnist-2.0.mar"]


@pytest.mark.usefixtures("deployed")
def test_status_as_a_table_and_as_json(own):
    shown = operate(own, "status").stdout
    assert shown.startswith("fashion_mnist is ready\nversion 2.0 (default)  fashion_mnist-2.0.mar  0 requests wait")
    assert re.search(r"^  worker \d+  READY  PID \d+  \d+ MB$", shown, re.MULTILINE)
    found = json.loads(operate(own, "status", "--json").stdout)
    assert found["ready"] is True
    assert [worker["state"] for worker in found["versions"][0]["workers"]] == ["READY"]


@pytest.mark.usefixtures("deployed")
def test_wrong_weights_go_back_by_themselves(own, service, url, second, store, tmp_path):
    with zipfile.ZipFile(second) as opened:
        state = torch.load(io.BytesIO(opened.read("model.pt")), weights_only=True)
        settings = yaml.safe_load(opened.read("model-config.yaml"))
    settings["handler"]["runtime"] = "torch"  # the one that reads model.pt
    torch.manual_seed(0)
    noise = {name: torch.randn_like(value) if value.is_floating_point() and value.ndim > 1 else value
             for name, value in state.items()}  # fmt: skip
    buffer = io.BytesIO()
    torch.save(noise, buffer)
    changes = {"model.pt": buffer.getvalue(), "model-config.yaml": yaml.safe_dump(settings).encode()}
    bad = changed(second, tmp_path / "bad.mar", "3.0", changes)
    reason = r"version 3\.0 is worse than 2\.0 on the golden set: .* is .* and not"
    with Traffic(url) as traffic, pytest.raises(RolloutError, match=reason):
        deploy(service, bad, store, GOLDEN, Watch(WATCH), print)
    assert traffic.seen.keys() == {"2.0"}, traffic.seen
    assert_unchanged(service, store)


@pytest.mark.usefixtures("deployed")
def test_a_version_that_fails_in_traffic_goes_back_by_itself(service, url, second, store, tmp_path, capsys):
    """The golden set is answered; two images in a request are not."""
    with zipfile.ZipFile(second) as opened:
        handler = opened.read("handler.py").decode()
    broken = handler.replace("images, several = parse_request(", "[_], several = images, _ = parse_request(")
    assert broken != handler
    bad = changed(second, tmp_path / "bad.mar", "3.0", {"handler.py": broken.encode()})
    with Traffic(url, bodies=(PNG, TWO)) as traffic:
        # The golden set may share a batch with the two images, and fail with them.
        with pytest.raises((RolloutError, OSError), match=r"version 3\.0 fails more often|answers 5\d\d"):
            deploy(service, bad, store, GOLDEN, Watch(4 * WATCH), print)
        traffic.restart_counting()
        traffic.wait_for(lambda seen: seen.total() > 4 * traffic.clients)
        traffic.restart_counting()
        traffic.wait_for(lambda seen: seen.total() > 4 * traffic.clients)
    assert traffic.seen.keys() == {"2.0"}, traffic.seen
    assert "went back to version 2.0" in capsys.readouterr().out
    assert_unchanged(service, store)


@pytest.mark.usefixtures("undeployed")
def test_a_canary_has_turns_with_the_old_version_before_it_serves(own, service, url, second, store):
    with Traffic(url) as traffic:
        done = operate(own, "deploy", second, "--canary", "20", "--watch", 10)
    assert done.returncode == 0, done.stdout + done.stderr
    first, then = done.stdout.split("version 2.0 is the default 20% of the time\n")[1].split(
        "version 2.0 is the default\n"
    )
    found = dict(re.findall(r"^version (\S+): (\d+) requests of others, 0\.00% got 5xx", first, re.MULTILINE))
    requests_of = {version: int(count) for version, count in found.items()}
    assert requests_of.keys() == {"1.0", "2.0"}
    assert 0.05 < requests_of["2.0"] / sum(requests_of.values()) < 0.45, first
    assert first.splitlines()[0] == then.splitlines()[0]  # the old one's, which the new one is compared with again
    assert traffic.seen.keys() == {"1.0", "2.0"}, traffic.seen
    assert versions(service) == {"2.0": True}
    assert store.deployed() == ["fashion_mnist-2.0.mar"]


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("what", ["in doubt", "slower"])
def test_a_canary_that_is_worse_goes_back(what, service, url, second, store, tmp_path, capsys):
    """Its labels are right, but it marks each as uncertain, or waits before it answers."""
    with zipfile.ZipFile(second) as opened:
        config, handler = json.loads(opened.read("model_config.json")), opened.read("handler.py").decode()
    if what == "in doubt":
        changes = {"model_config.json": json.dumps(config | {"uncertain_below": 1.0}).encode()}
        said = r"in doubt more often: 100\.0% of its answers are uncertain, of the old one's 0\.0%"
    else:
        slow = handler.replace(
            "        started = time.perf_counter()\n",
            "        started = time.perf_counter()\n        time.sleep(0.3)\n",
        )
        assert slow != handler
        changes, said = {"handler.py": slow.encode()}, r"slower: \d+ ms on average, the old one \d+ ms"
    bad = changed(second, tmp_path / "bad.mar", "3.0", changes)
    many = as_json(images=[as_base64(PNG)] * 16)
    with Traffic(url, clients=6, bodies=(many,)) as traffic:
        with pytest.raises(RolloutError, match=rf"version 3\.0 is {said}"):
            deploy(service, bad, store, GOLDEN, Watch(8 * WATCH, (0.5, 1.0)), print)
        assert "went back to version 2.0" in capsys.readouterr().out
    assert traffic.seen.keys() == {"2.0", "3.0"}, traffic.seen
    assert_unchanged(service, store)


def assert_unchanged(service: Service, store: Store) -> None:
    assert versions(service) == {"2.0": True}
    assert store.deployed() == ["fashion_mnist-2.0.mar"]
    assert not list(store.folder.glob("*3.0*"))


@pytest.mark.usefixtures("deployed")
def test_what_cannot_be_deployed_is_refused_with_the_reason(service, second, store, tmp_path):
    with pytest.raises(RolloutError, match=r"version 2\.0 is registered already; give the new archive another"):
        deploy(service, second, store, GOLDEN, Watch(WATCH), print)
    shutil.copy2(second, tmp_path / "x.mar")
    with pytest.raises(ArchiveError, match=r"x\.mar\.sha256 does not exist"):
        deploy(service, tmp_path / "x.mar", store, GOLDEN, Watch(WATCH), print)
    with pytest.raises(ValueError, match=r"labels\.csv does not exist; a golden set is a folder of images"):
        load_golden(tmp_path)
    assert_unchanged(service, store)


# ---- faults ----


@pytest.mark.usefixtures("deployed")
def test_a_full_disk_under_the_logs_stops_no_answer(own, url):
    logs = own.root / "torchserve" / ".run" / "logs"
    if not os.path.ismount(logs):
        pytest.skip("no right to mount a small file system")
    before = size_of(logs)
    break_connections(own)
    grown = wait_until(lambda: (grown := size_of(logs) - before) > PAGE and grown)  # else the rest would show nothing
    filler = logs / "filler"
    dd = ["dd", "if=/dev/zero", f"of={filler}", f"bs={PAGE}"]
    fill = subprocess.run(dd, capture_output=True, timeout=60, env=os.environ | {"LC_ALL": "C"})
    assert b"No space left" in fill.stderr
    before = size_of(logs)
    with Traffic(url, clients=2) as traffic:
        break_connections(own)
        traffic.wait_for(lambda seen: seen.total() > 20)
    assert traffic.seen.keys() == {"2.0"}, traffic.seen
    assert size_of(logs) - before < min(grown, len(LOGS) * PAGE)  # what was left of each file's last page
    filler.unlink()


def size_of(logs: Path) -> int:
    """Bytes in TorchServe's own logs."""
    return sum((logs / name).stat().st_size for name in LOGS)


def break_connections(own: Run) -> None:
    """Reset 50 connections in the middle of a request: TorchServe logs the stack trace of each."""
    at_once = struct.pack("ii", 1, 0)
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", own.ports[0]), TIMEOUT) as client:
            client.sendall(b"POST /predictions/fashion_mnist HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
            time.sleep(0.02)  # it is to be read before it ends
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)


@pytest.mark.usefixtures("deployed")
def test_after_a_crash_the_deployed_version_is_started_again_by_itself(own, service, url, store):
    killed = pid_of(own.root)
    with Traffic(url) as traffic:
        os.kill(killed, signal.SIGKILL)
        traffic.wait_for(lambda seen: seen["ConnectionError"] == traffic.clients)
    print(f"\nto {traffic.clients} clients came {dict(traffic.seen)}")
    assert traffic.seen.keys() <= {"2.0", "ConnectionError", 500, 503}
    log = own.root / "torchserve" / ".run" / "restarts.log"
    wait_until(lambda: "the server has ended by itself; starting it again" in log.read_text())
    wait_until(lambda: "Verifying the deployed archive" in log.read_text())  # it has the lock by then
    again = own.start("--native")  # waits for the watcher, which is at it
    assert f"TorchServe is running with this archive (process {pid_of(own.root)})" in again.stdout
    assert pid_of(own.root) != killed
    assert versions(service) == {"2.0": True}
    assert "Verifying the deployed archive torchserve/model-store/fashion_mnist-2.0.mar" in log.read_text()


@pytest.mark.usefixtures("deployed")
def test_a_deployed_archive_that_was_changed_is_refused(own, store):
    archive = store.folder / store.deployed()[-1]
    content = archive.read_bytes()
    archive.write_bytes(content + b"tampered")
    refused = own.script("--native", "--ports", ",".join(map(str, own.ports)))
    archive.write_bytes(content)
    assert refused.returncode == 1
    assert "fashion_mnist-2.0.mar was changed: its SHA-256 is" in refused.stderr


@pytest.mark.usefixtures("deployed")
def test_another_runtime_than_the_deployed_one_is_refused(own, store):
    before = pid_of(own.root)
    refused = own.script("--native", "--ports", ",".join(map(str, own.ports)), "--runtime", "torch")
    assert refused.returncode == 1
    assert "error: --runtime torch does not change the deployed archive" in refused.stderr
    assert "or remove the record: without torchserve/model-store/fashion_mnist.deployed" in refused.stderr
    assert pid_of(own.root) == before


@pytest.mark.usefixtures("deployed")
def test_rollback_under_traffic(own, service, url, store):
    """It serves what served before, although another archive was built since."""
    built = run_script(own.root, "./create_mar_archive.sh", "--version", "9.9", PYTHON=SERVING_PYTHON)
    assert built.returncode == 0, built.stderr
    with Traffic(url) as traffic:
        assert roll_back(service, store, print) == "1.0"
        traffic.wait_for(lambda seen: seen["1.0"] > 4 * traffic.clients)
    assert traffic.seen.keys() <= {"1.0", "2.0"}, traffic.seen
    assert versions(service) == {"1.0": True}
    assert store.deployed() == []
    assert {path.name.removesuffix(".sha256") for path in store.folder.iterdir()} == {
        "fashion_mnist.mar",
        "fashion_mnist.served.mar",
    }
    with pytest.raises(RolloutError, match="nothing was deployed"):
        roll_back(service, store, print)


@pytest.mark.usefixtures("undeployed")
def test_a_drain_ends_although_clients_name_the_version(own, url, second, store):
    """They get every answer or a 503; nothing brings the server back but a start."""
    with Traffic(f"{url}/1.0", clients=4) as traffic:
        traffic.wait_for(lambda seen: seen["1.0"] > traffic.clients)
        done = operate(own, "drain")
        during = traffic.restart_counting()
        traffic.wait_for(lambda seen: seen.total() > 4 * traffic.clients)
    assert done.stdout == "new requests are refused (503)\nevery request that was taken is answered\n", done.stderr
    assert during.keys() <= {"1.0", 503}, during
    assert traffic.seen.keys() == {503}, traffic.seen
    for order in (("scale", "--workers", 2), ("deploy", second)):
        refused = operate(own, *order)
        assert refused.returncode == 1
        assert "error: fashion_mnist is drained and its server is to stop; start it again: ./run_" in refused.stderr
    assert not list(store.folder.glob("*2.0*"))
    own.start("--native")
    assert requests.post(url, data=PNG, timeout=TIMEOUT).json()["model_version"] == "1.0"


@pytest.mark.usefixtures("undeployed")
def test_a_drain_that_takes_too_long_says_what_is_left(own, service, url):
    """The worker stands still with a request."""
    asked = partial(service.total, "ts_inference_requests_total", model_version="default")
    before, worker = asked(), service.describe()["workers"][0]["pid"]
    with ThreadPoolExecutor(1) as clients:
        os.kill(worker, signal.SIGSTOP)
        try:
            taken = clients.submit(requests.post, url, data=PNG, timeout=TIMEOUT)
            wait_until(lambda: asked() > before)
            done = operate(own, "drain", "--timeout", 1)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert taken.result().status_code == 200
    assert done.returncode == 1, done.stderr
    assert "new requests are refused (503)\nafter 1 s version 1.0 is still busy; " in done.stdout
    own.start("--native")


@pytest.mark.usefixtures("undeployed")
def test_stop_under_traffic_answers_what_was_taken(own, service, url):
    """30 slow requests are with the server when the stop begins, for its worker stands still; the other clients are
    refused with 503 from then on."""
    asked = partial(service.total, "ts_inference_requests_total", model_version="default")
    traffic, before, worker = Traffic(url, clients=4), asked(), service.describe()["workers"][0]["pid"]
    with ThreadPoolExecutor(31) as clients:
        os.kill(worker, signal.SIGSTOP)
        try:
            slow = [clients.submit(requests.post, url, data=SLOW, timeout=2 * TIMEOUT) for _ in range(30)]
            wait_until(lambda: asked() >= before + 30)
            stop = clients.submit(own.script, "--stop")
            wait_until(lambda: service.describe()["modelVersion"] == DRAINING)
            with traffic:
                traffic.wait_for(lambda seen: seen[503] > 0)
                os.kill(worker, signal.SIGCONT)
                done = stop.result()
        finally:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        answers = [request.result() for request in slow]
    assert [answer.status_code for answer in answers] == [200] * 30
    assert done.returncode == 0
    assert "new requests are refused (503)\nevery request that was taken is answered\n" in done.stdout
    assert traffic.seen.keys() <= {"1.0", 503, "ConnectionError"}, traffic.seen
    assert checksum_path(own.root / "torchserve" / "model-store" / "fashion_mnist.mar").is_file()
    wait_until_none(own.root)
