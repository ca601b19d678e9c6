"""src/serving/autoscaling.py: its rule by tables of numbers, its loop on a running TorchServe."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from src.serving.autoscaling import MEMORY, Load, Look, Rule, desired, load_between
from src.serving.draining import register_without_workers
from src.serving.lock import locked, run_folder
from src.serving.management import Service
from src.serving.operate import main
from src.serving.scaling import DRAINING
from src.serving.store import Store
from tests.conftest import ROOT, TIMEOUT, lent, run_script
from tests.drawing import encode
from tests.file_server import serve
from tests.sent_inputs import PICTURE
from tests.test_server_management import register_fragile
from tests.traffic import Traffic
from tests.waiting import wait_until

SLOW = encode(PICTURE.resize((4000, 4000)), "JPEG")  # takes a worker many times what a small image does
SCALING = 240  # seconds
CALM = Load(rate=10, wait_ms=1, waiting=0)
BUSY = Load(rate=100, wait_ms=50, waiting=0)


def look(at: float = 0, workers: int = 2, **changes) -> Look:
    """A look at ``at`` seconds of a server whose queue is empty."""
    values = {"version": "1.0", "ready": True, "batch_size": 32, "waiting": 0, "requests": 100, "queue_us": 1e6}
    return Look(time=at, pids=tuple(range(100, 100 + workers)), **values | changes)


# ---- the rule ----


@pytest.mark.parametrize(
    ("workers", "wait_ms", "waiting", "wanted"),
    [
        (1, 0, 0, 1),
        (1, 20, 0, 1),
        (1, 21.9, 0, 1),  # within the tolerance
        (1, 22.1, 0, 2),
        (4, 25, 0, 5),
        (4, 900, 0, 8),  # twice as many at a time
        (4, 9, 0, 2),
        (4, 0, 0, 1),
        (2, 0, 64, 2),  # a batch for each
        (2, 0, 96, 3),  # nobody was answered, so nobody has waited yet
        (2, 0, 1000, 4),
        (4, 5, 96, 3),  # the larger of the two
    ],
)
def test_desired_workers(workers, wait_ms, waiting, wanted):
    assert desired(workers, Load(rate=7, wait_ms=wait_ms, waiting=waiting), target_ms=20, batch_size=32) == wanted


@pytest.mark.parametrize(
    ("after", "load"),
    [
        (look(5, requests=200, queue_us=1.5e6), Load(rate=20, wait_ms=5, waiting=0)),
        (look(5, requests=150, queue_us=1.5e6, waiting=40), Load(rate=10, wait_ms=50, waiting=40)),
        (look(5), Load(rate=0, wait_ms=0, waiting=0)),
        (look(5, requests=150, waiting=50), Load(rate=10, wait_ms=0, waiting=50)),  # none has left the queue
        (look(5, requests=30, queue_us=2e6), None),  # the server was started again
        (look(5, requests=200, queue_us=2e5), None),
        (look(5, version="2.0", requests=200, queue_us=2e6), None),
        (look(5, workers=3, requests=200, queue_us=2e6), None),
        (replace(look(5, requests=200, queue_us=2e6), pids=(100, 102)), None),  # a worker died
    ],
)
def test_load_between_two_looks(after, load):
    assert load_between(look(0), after) == load
    assert load_between(None, after) is None


def test_what_waited_before_and_left_the_queue_is_in_the_mean():
    assert load_between(look(0, waiting=900), look(5, queue_us=10e6)) == Load(rate=0, wait_ms=10, waiting=0)


@pytest.mark.parametrize(
    "story",  # at, workers, load -> workers
    [
        [(0, 1, None, 1), (5, 1, BUSY, 2), (10, 2, None, 2), (15, 2, BUSY, 3), (20, 3, None, 3), (25, 3, BUSY, 3)],
        [(0, 1, None, 1), (5, 1, CALM, 1), (500, 1, CALM, 1)],  # never below the least
        [(0, 3, None, 3), (5, 3, CALM, 3), (60, 3, CALM, 3), (65, 3, CALM, 2), (70, 2, None, 2), (75, 2, CALM, 2)],
        [(0, 2, CALM, 2), (55, 2, BUSY, 3)],  # up at once
        [(0, 2, CALM, 2), (55, 2, Load(10, 15, 0), 2), (60, 2, CALM, 2), (115, 2, CALM, 2), (120, 2, CALM, 1)],
        [(0, 2, CALM, 2), (55, 2, None, 2), (60, 2, CALM, 2), (119, 2, CALM, 2)],  # an interval that nobody saw
        [(0, 9, None, 3), (5, 0, None, 1)],  # the bounds hold at once
    ],
)
def test_a_rule_goes_up_at_once_and_down_after_a_quiet_window(story):
    rule = Rule(least=1, most=3, target_ms=20, quiet=60)
    assert [rule.decide(look(at, workers), load) for at, workers, load, _ in story] == [line[-1] for line in story]


@pytest.mark.parametrize(
    ("at", "rate", "version", "workers"),
    [
        (1000, 69, "1.0", 1),
        (1000, 71, "1.0", 2),  # one worker did not carry 100 requests/s
        (1000, 71, "2.0", 1),  # another version may
        (1001 + MEMORY, 71, "1.0", 1),  # other images may be sent by now
    ],
)
def test_a_rule_does_not_go_back_to_what_was_too_few(at, rate, version, workers):
    rule, calm = Rule(least=1, most=3, target_ms=20, quiet=60), Load(rate, 1, 0)
    assert rule.decide(look(0, 1), BUSY) == 2
    assert rule.decide(look(at, 2, version=version), calm) == 2
    assert rule.decide(look(at + 60, 2, version=version), calm) == workers


def test_workers_that_load_are_no_measure():
    assert Rule(least=1, most=3, target_ms=20, quiet=60).decide(look(ready=False), BUSY) == 2


@pytest.mark.parametrize("bounds", [["--min", "0"], ["--min", "3", "--max", "2"]])
def test_bounds_that_cannot_be_are_refused(bounds, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["autoscale", *bounds])
    assert "give 1 <= --min <= --max" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--target-ms", "--interval"])
def test_what_must_not_be_zero_is_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["autoscale", option, "0"])
    assert f"argument {option}: 0 is not above 0" in capsys.readouterr().err


# ---- the loop ----


@contextmanager
def running(output: Path, service: Service, *options: str) -> Iterator[subprocess.Popen]:
    """The command as it runs beside a server, its lines in ``output``; ended afterwards."""
    addresses = [f"--{api}={getattr(service, api)}" for api in ("inference", "management", "metrics")]
    command = [sys.executable, "-u", "-m", "src.serving.operate", "autoscale", *addresses, *options]
    # These tests may run in a background job, which ignores SIGINT and hands that on.
    heeded = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with (
        output.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, **heeded) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def service(server) -> Service:
    return Service("fashion_mnist", server.inference, server.management, server.metrics)


@pytest.fixture
def store(server) -> Path:
    return server.root / "torchserve" / "model-store"


def test_workers_follow_the_load_and_no_request_is_lost(server, service, store, tmp_path):
    """None while another holds the lock, then two, then one when nearly nothing comes; and Control-C ends it."""
    output, url = tmp_path / "output", f"{server.inference}/predictions/fashion_mnist"
    options = ("--max=2", "--target-ms=10", "--quiet=2", "--interval=0.5", f"--store={store}")
    with running(output, service, *options) as process:

        def has(workers: int) -> bool:
            assert process.poll() is None, output.read_text()
            return f"-> {workers} (" in output.read_text()

        with Traffic(url, clients=16, bodies=(SLOW,)) as traffic:
            with locked(run_folder(store)):
                traffic.wait_for(lambda seen: seen.total() > 200, SCALING)
                assert len(server.describe()["workers"]) == 1
                assert output.read_text() == ""
            wait_until(lambda: has(2), SCALING, output.read_text)
            assert traffic.restart_counting().keys() == {"1.0"}
            traffic.wait_for(lambda seen: seen.total() > 200, SCALING)
            assert len(server.describe()["workers"]) == 2
        assert traffic.seen.keys() == {"1.0"}

        def sent_until_one() -> bool:
            assert server.predict(SLOW).status_code == 200
            time.sleep(0.2)
            return has(1)

        wait_until(sent_until_one, SCALING, output.read_text)
        assert len(server.describe()["workers"]) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
    up, down = output.read_text().splitlines()
    assert "workers of fashion_mnist: 1 -> 2 (" in up
    assert "workers of fashion_mnist: 2 -> 1 (" in down
    assert " requests/s waited " in up


def test_it_waits_for_the_server_that_follows_a_drained_one(service, store, tmp_path):
    """SIGTERM ends it as it ends any process."""
    output = tmp_path / "output"
    register_without_workers(service, store)
    service.manage(f"/{DRAINING}/set-default", "PUT")
    with running(output, service, "--min=2", "--max=2", "--interval=0.2", f"--store={store}") as process:
        wait_until(lambda: "is drained" in output.read_text(), SCALING, output.read_text)
        service.manage("/1.0/set-default", "PUT")
        wait_until(lambda: "1 -> 2 (by --min and --max)" in output.read_text(), SCALING, output.read_text)
        process.terminate()
        assert process.wait(TIMEOUT) == -signal.SIGTERM
    assert len(output.read_text().splitlines()) == 2


def test_a_server_that_does_not_answer_is_said_once(tmp_path):
    output = tmp_path / "output"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(TIMEOUT)
        nothing = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with running(output, Service("fashion_mnist", nothing, nothing, nothing), "--interval=0.1"):
            for _ in range(3):
                connection, _ = silent.accept()
                with connection:
                    connection.recv(65536)  # closed with the request unread it would be reset
    [line] = output.read_text().splitlines()
    assert nothing in line
    assert line.endswith("; looking on")


def test_a_worker_that_cannot_load_is_said_once(server, service, store, tmp_path):
    output = tmp_path / "output"
    with lent(server):
        register_fragile(service, Store(store, "fashion_mnist"), tmp_path / "loads")
        (tmp_path / "loads").unlink()
        service.manage("/2.0?min_worker=2&max_worker=2", "PUT")
        wait_until(lambda: len(server.describe()["workers"]) == 2)
        with running(output, service, "--max=2", "--interval=0.1", f"--store={store}") as process:
            wait_until(
                lambda: "a worker of fashion_mnist is not READY" in output.read_text(), SCALING, output.read_text
            )
            time.sleep(2)  # twenty looks
            assert process.poll() is None
        assert len(server.describe()["workers"]) == 2
        assert output.read_text().count("\n") == 1
        service.manage("/2.0?min_worker=1&max_worker=1", "PUT")


def test_a_refusal_is_final_after_a_second_look(tmp_path):
    """The keys may be those of a server that was started again since they were read."""
    with serve({}) as server:
        addresses = (f"--{api}={server.url}" for api in ("inference", "management", "metrics"))
        done = run_script(ROOT, sys.executable, "-m", "src.serving.operate", "autoscale", *addresses, timeout=TIMEOUT)
        assert [name for name, _ in server.requests] == ["models/fashion_mnist"] * 2
    assert done.returncode == 1
    assert "answers 404" in done.stderr


def test_a_model_that_the_server_does_not_know_ends_it(service):
    command = [sys.executable, "-m", "src.serving.operate", "autoscale", "--model=none"]
    done = run_script(ROOT, *command, f"--management={service.management}", timeout=TIMEOUT)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: GET {service.management}/models/none answers 404: ")
