"""run_torchserve.sh when something is wrong: it ends with the reason and the remedy, and leaves nothing running."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from src.serving.ports import free_ports
from tests.conftest import ROOT, copy_checkout, run_script
from tests.script_run import Run, bare_environment, processes_of, wait_until_none


@pytest.fixture(scope="module")
def idle(server, tmp_path_factory) -> Run:
    """A checkout in which nothing is meant to run in the end."""
    return Run(
        copy_checkout(tmp_path_factory.mktemp("idle")),
        free_ports(3),
        bare_environment(tmp_path_factory.mktemp("tools")),
    )


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


def test_a_server_that_cannot_be_started_again_is_given_up(tmp_path):
    """The sleep of this test takes no time and notes the seconds."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "torchserve").mkdir()
    for name in ("watch.sh", "native.sh"):
        shutil.copy2(ROOT / "torchserve" / name, tmp_path / "torchserve")
    for name, does in {"run_torchserve.sh": "echo 'no memory'; exit 1", "bin/sleep": 'echo "$1" >>"$SLEPT"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slept, path = tmp_path / "slept", f"{tmp_path}/bin:{os.environ['PATH']}"
    done = run_script(tmp_path, "torchserve/watch.sh", str(tmp_path), "--secure", PATH=path, SLEPT=str(slept))
    *tried, given_up = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (1, "")
    assert len(tried) == 12
    assert all(line.endswith("the server has ended by itself; starting it again") for line in tried[::2])
    assert tried[1::2] == ["no memory"] * 6
    assert given_up.endswith("given up: start it with ./run_torchserve.sh when the reason above is gone")
    assert sum(map(float, slept.read_text().split()[1:])) == 63


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
        (["--runtime", "tensorrt"], "--runtime is 'tensorrt'; it must be onnx-int8, onnx or torch"),
        (["--runtime"], "--runtime is ''; it must be onnx-int8, onnx or torch"),
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
    assert "error: the model fashion_mnist did not become ready; the log above is from" in done.stderr


def test_a_model_that_does_not_load_ends_with_the_log(idle):
    handler = idle.root / "torchserve" / "handler.py"
    handler.write_text('raise RuntimeError("broken on purpose")\n')
    done = idle.script("--native", "--ports", ",".join(map(str, idle.ports)))
    assert done.returncode == 1
    assert "RuntimeError: broken on purpose" in done.stderr
    assert "error: a worker of fashion_mnist died 2 times while it loaded the model" in done.stderr
    assert "error: the model fashion_mnist did not become ready; the log above is from" in done.stderr
    wait_until_none(idle.root)
