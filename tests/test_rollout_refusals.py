"""A deploy that cannot end well: it is refused or goes back, and the server and its store are as before."""

import fcntl
import io
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest
import torch
import yaml

from src.export.archive import ArchiveError, verify
from src.serving.client import Refused
from src.serving.golden import RAW, Item, answer_golden, compare, load_golden
from src.serving.management import NotReady, Service, count_ready
from src.serving.retiring import retire
from src.serving.rollout import NotBack, deploy, roll_back
from src.serving.store import Store
from src.serving.watching import Trial, Watch
from tests.conftest import ROOT, TIMEOUT, run_script
from tests.script_run import pid_of
from tests.sent_inputs import PNG
from tests.test_rollout import SERVING_PYTHON, changed, versions
from tests.waiting import wait_until

GOLDEN = load_golden(ROOT / "torchserve" / "golden")


@pytest.fixture(scope="module")
def service(server) -> Service:
    return Service("fashion_mnist", server.inference, server.management, server.metrics)


@pytest.fixture(scope="module")
def store(server) -> Store:
    return Store(server.root / "torchserve" / "model-store", "fashion_mnist")


@pytest.fixture(scope="module")
def second(store, tmp_path_factory) -> Path:
    """What is served, as version 2.0."""
    return changed(store.served, tmp_path_factory.mktemp("new") / "x.mar", "2.0", {})


@pytest.fixture(autouse=True)
def _nothing_is_left(service, store):
    before = sorted(store.folder.iterdir())
    yield
    assert versions(service) == {"1.0": True}
    assert sorted(store.folder.iterdir()) == before


def command(server, verb: str, *arguments) -> list[str]:
    """``python -m src.serving.operate VERB`` for the server."""
    apis = ("inference", "management", "metrics")
    addresses = [text for api in apis for text in (f"--{api}", getattr(server, api))]
    return [SERVING_PYTHON, "-m", "src.serving.operate", verb, *map(str, arguments), *addresses]


def test_only_one_changes_what_is_served(server, second):
    with (server.root / "torchserve" / ".run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as ./run_torchserve.sh or another deploy
        for arguments in (("deploy", second), ("rollback",), ("scale", "--workers", 2), ("drain",)):
            done = run_script(server.root, *command(server, *arguments))
            assert (done.returncode, done.stdout) == (1, "")
            said = "torchserve/.run/lock is locked: another deploy, rollback, scale, drain or ./run_torchserve.sh is"
            assert said in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_deploy_that_is_ended_goes_back(number, server, second):
    """Its terminal is gone by then, too."""
    line = command(server, "deploy", second, "--watch", 60)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell has its background jobs ignore SIGINT, and nohup SIGHUP; both hand that on: these tests may run in one.
    heeded = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}
    with subprocess.Popen(line, cwd=server.root, **pipes, **heeded) as process:
        assert any("version 2.0 is the default" in line for line in process.stdout)
        process.stdout.close()
        process.send_signal(number)
        assert f"error: ended by {number.name}" in process.stderr.read()
    assert process.returncode == 1


def test_a_deploy_that_is_ended_while_the_new_version_hangs_goes_back_at_once(server, service, second):
    """It does not wait for the answer to its own request; the worker stands still until the old version serves."""
    line = command(server, "deploy", second, "--watch", 60)
    with subprocess.Popen(line, cwd=server.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any("version 2.0 is the default" in line for line in process.stdout)
        worker = service.describe("2.0")["workers"][0]["pid"]
        os.kill(worker, signal.SIGSTOP)
        try:
            time.sleep(1)  # it asks by now
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: service.describe()["modelVersion"] == "1.0", 10)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert "error: ended by SIGTERM" in process.communicate(timeout=4 * TIMEOUT)[1]


def test_after_a_deploy_was_killed_the_message_says_how_to_go_back(server, service, store, second):
    with subprocess.Popen(
        command(server, "deploy", second, "--watch", 60), cwd=server.root, stdout=subprocess.PIPE, text=True
    ) as process:
        assert any("version 2.0 is the default" in line for line in process.stdout)
        process.kill()
    assert versions(service) == {"1.0": False, "2.0": True}
    for order in (("deploy", second), ("rollback",)):
        refused = run_script(server.root, *command(server, *order))
        assert refused.stderr.startswith("error: version 2.0 is the default but not recorded as deployed: its deploy")
    remedy = re.search(r"Go back first: (curl .*; curl .*)$", refused.stderr)[1]
    assert run_script(server.root, "bash", "-ec", remedy).returncode == 0
    wait_until(lambda: versions(service) == {"1.0": True})
    store.remove(store.archive_of("2.0"))


class Ended(Store):
    """A signal comes as soon as the record is written."""

    def write(self, names: list[str]) -> None:
        before = self.deployed()
        super().write(names)
        if len(names) != len(before) and not (self.folder / "told").exists():
            (self.folder / "told").touch()
            raise SystemExit("ended")


def test_a_deploy_or_rollback_that_is_ended_at_its_end_leaves_the_record_as_it_was(service, store, second):
    ended = Ended(store.folder, store.model)
    with pytest.raises(SystemExit, match="ended"):
        deploy(service, second, ended, GOLDEN, Watch(0), print)
    assert store.deployed() == []
    assert versions(service) == {"1.0": True}
    assert deploy(service, second, ended, GOLDEN, Watch(0), print) == "2.0"
    (store.folder / "told").unlink()
    with pytest.raises(SystemExit, match="ended"):
        roll_back(service, ended, print)
    assert store.deployed() == ["fashion_mnist-2.0.mar"]
    assert versions(service) == {"2.0": True}
    assert roll_back(service, ended, print) == "1.0"
    (store.folder / "told").unlink()


# ---- turns ----


@pytest.fixture
def trial(server, service, store, second) -> Iterator[Trial]:
    """Version 2.0 beside 1.0."""
    shutil.copyfile(second, store.archive_of("2.0"))
    service.register(f"{store.archive_of('2.0').name}&initial_workers=1&synchronous=true")
    yield Trial(service, store.run, GOLDEN, "1.0", "2.0", print)
    with suppress(Refused):  # a test has done it
        service.manage("/2.0", "DELETE")
    store.archive_of("2.0").unlink()


def test_what_comes_after_a_turn_is_not_of_its_version(service, trial):
    """The new version answers our request long after its turn; meanwhile others ask the old one."""
    worker = service.describe("2.0")["workers"][0]["pid"]
    with ThreadPoolExecutor(1) as turns:
        os.kill(worker, signal.SIGSTOP)
        try:
            turn = turns.submit(trial.try_new, cycle(GOLDEN), 1.0, "1.0")
            wait_until(lambda: service.describe()["modelVersion"] == "2.0")
            wait_until(lambda: service.describe()["modelVersion"] == "1.0")
            time.sleep(0.5)  # what came is counted
            for _ in range(20):
                assert service.predict(PNG, "", RAW)["model_version"] == "1.0"
        finally:
            os.kill(worker, signal.SIGCONT)
        counts, own = turn.result()
    assert (counts.requests, own.answers) == (0, 1)


def test_an_old_version_that_is_gone_ends_its_turn(service, trial):
    """Whoever starts a server again waits for the lock of the deploy."""
    trial.old, trial.new, begun = "2.0", "1.0", time.monotonic()
    remove = threading.Timer(2, lambda: service.manage("/2.0", "DELETE"))
    remove.start()
    with pytest.raises(NotReady, match="answers 404"):
        trial.leave_old(60)
    assert 2 <= time.monotonic() - begun < 30
    remove.join()


def test_a_deploy_that_is_ended_once_the_new_version_serves_is_done(server, service, store, second):
    """Somebody still asks for the old one by its number, so it is not let go before."""
    line, ended = command(server, "deploy", second, "--watch", 0.5), threading.Event()

    def ask() -> None:
        while not ended.wait(0.2):
            service.predict(PNG, "1.0", RAW)

    with ThreadPoolExecutor(1) as client:
        asking = client.submit(ask)
        try:
            with subprocess.Popen(line, cwd=server.root, stdout=subprocess.PIPE, text=True) as process:
                wait_until(store.record.exists, 2 * TIMEOUT)
                time.sleep(1)  # until it waits for that
                process.send_signal(signal.SIGTERM)
                said = process.communicate(timeout=TIMEOUT)[0]
        finally:
            ended.set()
        asking.result()
    assert process.returncode == 0
    assert "version 1.0 stays registered (error: ended by SIGTERM); later: curl -X DELETE" in said
    assert versions(service) == {"1.0": False, "2.0": True}
    # It is still registered, but it has lost its workers.
    service.manage("/1.0?min_worker=0&max_worker=0", "PUT")
    wait_until(lambda: not service.describe("1.0")["workers"])
    assert roll_back(service, store, print) == "1.0"
    assert count_ready(service.describe()) == 1


def test_when_going_back_fails_the_archive_stays_and_the_message_says_how(server, service, store, second):
    """The server hangs as soon as the new version is the default, and answers again later."""
    java = pid_of(server.root)

    def say(line: str) -> None:
        if line == "version 2.0 is the default":
            os.kill(java, signal.SIGSTOP)

    try:
        with pytest.raises(NotBack) as failed:
            deploy(service, second, store, GOLDEN, Watch(0.5), say)
    finally:
        os.kill(java, signal.SIGCONT)
    said = str(failed.value)
    silent = r".*: no answer within \d+ s"
    assert re.match(rf"{silent}; going back failed, too: {silent}\. Version 2\.0 may be the default now", said)
    assert isinstance(failed.value.__cause__, TimeoutError)
    assert store.archive_of("2.0").is_file()
    wait_until(lambda: versions(service) == {"1.0": False, "2.0": True})
    done = run_script(server.root, "bash", "-c", re.search(r"set 1\.0 back: (curl .*)$", said)[1])
    assert done.returncode == 0, done.stderr
    retire(service, "2.0", print)
    store.remove(store.archive_of("2.0"))


def test_a_deploy_that_cannot_be_recorded_goes_back(service, store, second):
    blocked = store.folder / ".fashion_mnist.deployed.part"
    blocked.mkdir()
    with pytest.raises(OSError, match="directory"):
        deploy(service, second, store, GOLDEN, Watch(0.5), print)
    blocked.rmdir()


def test_an_archive_that_does_not_fit_on_the_disk_leaves_nothing(server, second):
    """The limit on a file's size ends the copy in the middle, as a full disk does."""
    done = run_script(server.root, "bash", "-c", 'ulimit -f 100; "$@"', "-", *command(server, "deploy", second))
    assert done.returncode == 1
    assert "error: [Errno 27] File too large" in done.stderr


def test_an_archive_that_changes_while_it_is_copied_is_refused(store, second, tmp_path):
    digest, copy = verify(second), tmp_path / "y.mar"
    shutil.copyfile(second, copy)
    with copy.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ArchiveError, match=r"y\.mar was changed while it was copied"):
        store.add(copy, digest, store.archive_of("2.0"))


def test_a_network_that_computes_no_number_goes_back_with_the_reason(server, second, tmp_path):
    with zipfile.ZipFile(second) as opened:
        state = torch.load(io.BytesIO(opened.read("model.pt")), weights_only=True)
        settings = yaml.safe_load(opened.read("model-config.yaml"))
    settings["handler"]["runtime"] = "torch"  # the one that reads model.pt
    buffer = io.BytesIO()
    nothing = {name: value * float("nan") if value.is_floating_point() else value for name, value in state.items()}
    torch.save(nothing, buffer)
    changes = {"model.pt": buffer.getvalue(), "model-config.yaml": yaml.safe_dump(settings).encode()}
    bad = changed(second, tmp_path / "bad.mar", "3.0", changes)
    done = run_script(server.root, *command(server, "deploy", bad))
    assert done.returncode == 1
    assert "went back to version 1.0" in done.stdout
    assert done.stderr.startswith("error: trouser_1.png gets no label or not a number for each class: {")
    assert done.stderr.count("\n") == 1


def test_a_golden_set_that_cannot_tell_is_refused(service):
    trouser = GOLDEN[0]
    answers = answer_golden(service, [trouser])
    assert compare([trouser], answers, answers)[0]
    with pytest.raises(ValueError, match=r"^Cat, in the golden set, is no class .*--golden FOLDER"):
        compare([Item(trouser.name, trouser.data, "Cat")], answers, answers)
    with pytest.raises(ValueError, match=r"has none of the golden set right, so it cannot judge; .*--golden FOLDER"):
        compare([Item(trouser.name, trouser.data, "Bag")], answers, answers)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("label,filename\nBag\n", "line 2: it needs a filename and a label"),
        ("filename,label\nbag.png\n", "line 2: it needs a filename and a label"),
        ("filename,label\n,Bag\n", "line 2: it needs a filename and a label"),
        ("filename,label\n" + "x" * 140_000 + ",Bag\n", r"line \d: field larger than field limit"),
    ],
)
def test_a_golden_set_with_a_row_that_is_none_is_refused(text, said, tmp_path):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_golden(tmp_path)
