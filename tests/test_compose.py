"""docker-compose.yml and environment.yaml as far as they can be checked without an engine; the MLflow server runs."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import requests
import yaml
from mlflow import MlflowClient

from src.serving.ports import free_ports
from tests.conftest import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
KEYS = {"image", "build", "ports", "environment", "volumes", "init", "read_only", "tmpfs", "cap_drop", "security_opt"}
KEYS |= {"restart", "stop_grace_period"}
VERSIONED = re.compile(r"[\w./-]+:v?\d[\w.-]*")  # an image
PLACEHOLDER = re.compile(r"\$\{[A-Z0-9_]+:-[^}]*\}")


def dockerfile_of(service: str) -> Path:
    build = SERVICES[service]["build"]
    return ROOT / build["context"] / build.get("dockerfile", "Dockerfile")


def dockerfile_words(text: str, instruction: str) -> list[str]:
    """The words of the last ``instruction`` in a Dockerfile, its continued lines joined."""
    return re.findall(rf"^{instruction} (.*)$", text.replace("\\\n", " "), re.M)[-1].split()


def test_only_what_the_compose_format_knows():
    assert COMPOSE.keys() <= {"name", "services", "volumes"}
    for service in SERVICES.values():
        assert service.keys() <= KEYS
        assert service["build"].keys() <= {"context", "dockerfile"}
        for value in service.get("environment", {}).values():
            assert value is None or PLACEHOLDER.fullmatch(value), "keys come from the caller's environment"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]


def test_ci_runs_the_lines_at_the_head():
    text = (ROOT / "docker-compose.yml").read_text()
    lines = re.findall(r"^#   (.*)$", text, re.M)
    assert len(lines) == 2
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["containers"]["steps"]
    commands = [line for step in steps for line in step.get("run", "").splitlines()]
    wanted = [command for line in lines for command in line.split(" && ")]
    at = commands.index(wanted[0])
    assert commands[at : at + len(wanted)] == wanted
    assert "./run_torchserve.sh --stop" in commands[:at], "its ports are those of the services"
    assert commands[-1] == "docker compose down"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_built_of_files_that_exist_and_images_with_a_version(name):
    text = dockerfile_of(name).read_text()
    ignored = (ROOT / SERVICES[name]["build"]["context"] / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        for source in line.split():
            assert f"!{source}" in ignored, f"{source} is kept out of the build"
            if "model-store" not in source:  # ./create_mar_archive.sh makes these
                assert (ROOT / SERVICES[name]["build"]["context"] / source).exists()
    images = [SERVICES[name]["image"], *re.findall(r"^ARG BASE_IMAGE=(\S+)$", text, re.M)]
    assert len(images) == 2
    for image in images:
        assert VERSIONED.fullmatch(image), f"{image} has no version"
    for used in re.findall(r"^FROM (\S+)", text, re.M):
        assert used == "${BASE_IMAGE}"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_reached_from_this_machine_only_and_may_do_little(name):
    service, text = SERVICES[name], dockerfile_of(name).read_text()
    exposed = dockerfile_words(text, "EXPOSE")
    assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in exposed]
    assert re.search(r"^USER 10001$", text, re.M)
    assert "HEALTHCHECK" in text, "docker compose up --wait waits for it"
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.fixture
def mlflow_server(tmp_path):
    """``(its address, the image's ENV)``: the server as the image starts it, on a free port and in ``tmp_path``."""
    text, (port,) = dockerfile_of("mlflow").read_text(), free_ports(1)

    def here(value: str) -> str:
        return value.replace("/mlflow", str(tmp_path), 1) if "/mlflow" in value else value.replace("5000", str(port))

    words = [word.partition("=") for word in dockerfile_words(text, "ENV")]
    settings = {name: here(value) for name, _, value in words if name.startswith("MLFLOW_")}
    command = json.loads(re.search(r"^CMD (\[.*\])$", text, re.M)[1])
    command = [word.replace("0.0.0.0", "127.0.0.1").replace("5000", str(port)) for word in command]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True,
                                   env={**os.environ, **settings, "PATH": path})  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}", settings
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def wait_until_healthy(check: list[str], log: Path) -> None:
    """Until the image's health check passes."""
    for _ in range(120):
        if subprocess.run(check, capture_output=True, timeout=60).returncode == 0:
            return
        time.sleep(1)
    pytest.fail(log.read_text())


def test_the_mlflow_server_of_the_image_keeps_runs_and_artifacts(mlflow_server, tmp_path):
    address, settings = mlflow_server
    check = re.search(r"HEALTHCHECK.*?CMD (\[.*?\])$", dockerfile_of("mlflow").read_text(), re.M | re.S)[1]
    check = [word.replace("http://127.0.0.1:5000", address) for word in json.loads(check)]
    wait_until_healthy([sys.executable, *check[1:]], tmp_path / "log")
    client = MlflowClient(address)
    run = client.create_run(client.create_experiment("e"))
    client.log_metric(run.info.run_id, "val_accuracy", 0.5)
    client.log_text(run.info.run_id, "content", "note.txt")
    assert client.get_run(run.info.run_id).data.metrics == {"val_accuracy": 0.5}
    assert [path.read_text() for path in (tmp_path / "artifacts").rglob("note.txt")] == ["content"]
    assert (tmp_path / "mlflow.db").is_file()
    path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=e"
    for host in settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","):
        assert requests.get(address + path, headers={"Host": host}, timeout=30).status_code == 200, host
    refused = requests.get(address + path, headers={"Host": "elsewhere.example"}, timeout=30)
    assert refused.status_code == 403, "a page that a browser has open cannot reach the server under its own name"


def test_the_server_has_the_version_of_the_client():
    line = next(line for line in dockerfile_of("mlflow").read_text().splitlines() if "grep" in line)
    grep = [word.replace("/pins/", f"{ROOT}/") for word in shlex.split(re.search(r"\$\((.*)\)", line)[1])]
    (found,) = subprocess.run(grep, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    assert found in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_conda_environment_is_that_of_pip():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, _, pip = environment["dependencies"]
    assert environment["name"] == project["name"]
    assert f">={python.removeprefix('python=')}" == project["requires-python"]
    assert pip == {"pip": ["-r requirements.txt"]}
    assert "-c constraints.txt" in (ROOT / "requirements.txt").read_text().splitlines()
