"""The processes of the FastAPI server: overload, their end under load, a worker that dies, options that cannot be."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from src.serving.fastapi_app import main
from tests.conftest import ROOT, TIMEOUT, run_script
from tests.drawing import encode
from tests.fastapi_run import check_metrics, lines_of, ready_workers, running, wait_for_ready
from tests.sent_inputs import PICTURE, PNG, as_base64, as_json
from tests.waiting import stop, wait_until

LARGE = encode(PICTURE.resize((4000, 4000)), compress_level=1)  # takes a thread a good while
TWO = as_json(images=[as_base64(PNG)] * 2)


def test_overload_and_health_under_load(tmp_path):
    """One thread and a queue of one: /health answers meanwhile, who finds the queue full is told when to come again."""
    with (
        running(tmp_path / "log.jsonl", "--threads", "1", "--queue", "1") as (url, _),
        ThreadPoolExecutor(6) as clients,
    ):
        sent = [clients.submit(requests.post, f"{url}/predict", LARGE, timeout=TIMEOUT) for _ in range(6)]
        seen = set()
        while not all(item.done() for item in sent):
            seen.add(requests.get(f"{url}/health", timeout=TIMEOUT).json()["requests"])
        assert 2 in seen
        answers = [item.result() for item in sent]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 1 <= len(refused) <= 4
        for answer in refused:
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert (answer.json()["code"], answer.json()["type"]) == (503, "overloaded")
        assert requests.post(f"{url}/predict", PNG, timeout=TIMEOUT).status_code == 200


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_under_load_loses_nothing(tmp_path, workers):
    """Every request that reached an open connection is answered; a new connection is refused, not broken."""
    log = tmp_path / "log.jsonl"
    seen: list[object] = []
    with running(log, "--workers", workers, "--threads", "1") as (url, process):
        wait_for_ready(log, int(workers))

        def client() -> None:
            with requests.Session() as session:
                while True:
                    try:
                        seen.append(session.post(f"{url}/predict", TWO, timeout=TIMEOUT).status_code)
                    except requests.ConnectionError as error:
                        seen.append("refused" if "Connection refused" in str(error) else error)
                        return

        clients = [threading.Thread(target=client) for _ in range(8)]
        for thread in clients:
            thread.start()
        wait_until(lambda: len(seen) >= 100)
        process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join(TIMEOUT)
        assert process.wait(TIMEOUT) == 0
    assert set(seen) == {200, "refused"}
    assert seen.count("refused") == 8
    assert len([line for line in lines_of(log) if line.get("path") == "/predict"]) == seen.count(200)


def test_a_worker_that_dies_is_replaced(tmp_path):
    log = tmp_path / "log.jsonl"
    with running(log, "--workers", "2", "--threads", "1") as (url, process):
        wait_for_ready(log, 2)
        os.kill(ready_workers(log)[0], signal.SIGKILL)
        wait_for_ready(log, 3)
        check_metrics(url)  # the workers count together
        os.kill(process.pid, signal.SIGKILL)  # nobody is left to tell the workers
        for pid in ready_workers(log)[1:]:
            wait_until(lambda pid=pid: has_ended(pid))


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or only waits for a parent that reaps nobody, as in some containers."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_that_nobody_reaped_has_ended():
    with subprocess.Popen(["sleep", "60"]) as child:
        assert not has_ended(child.pid)
        child.kill()
        wait_until(lambda: has_ended(child.pid))
        assert psutil.pid_exists(child.pid)
    assert has_ended(child.pid)


def test_a_server_that_ignores_sigterm_is_killed_with_its_workers(tmp_path):
    worker = tmp_path / "worker"
    script = f"trap '' TERM; sleep 60 & echo $! >{worker}; wait"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as process:
        wait_until(lambda: worker.is_file() and worker.read_text())
        with pytest.raises(subprocess.TimeoutExpired):
            stop(process, 0.2)
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: has_ended(int(worker.read_text())))


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--workers", "0", "--workers is 0; it must be at least 1"),
        ("--threads", "0", "--threads is 0"),
        ("--queue", "-1", "--queue is -1"),
        ("--port", "65536", "--port is 65536"),
        ("--host", "192.0.2.1", "--host 192.0.2.1 --port 8000"),  # an address for documentation, of no machine
        ("--runtime", "none", "invalid choice: 'none'"),
    ],
)
def test_bad_options(capsys, option, value, part):
    with pytest.raises(SystemExit) as ended:
        main([option, value])
    assert ended.value.code == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_folder_without_a_model(tmp_path, workers):
    options = ["--port", "0", "--model-path", str(tmp_path), "--workers", workers]
    done = run_script(ROOT, sys.executable, "-m", "src.serving.fastapi_app", *options)
    assert done.returncode == 2
    assert f"{tmp_path}/config.json does not exist" in done.stderr
    assert "Traceback" not in done.stderr
