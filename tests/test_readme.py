"""What the README says is true: its commands run as written, its figures are measured, its tree and links exist."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, copy_checkout, run_script, shrink_experiment
from tests.tables import rows_of

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
CURL = [command for command in COMMANDS if command.startswith("curl")]
LOCAL = [command for command in COMMANDS if not command.startswith(("curl", "make", "./run_torchserve.sh"))]
SNIPPET = re.search(r"```python\n(.*?)```", README, re.S)[1]
TREE = re.search(r"```text\n(.*?)```", README, re.S)[1]
SHOWN_ANSWER = json.loads(re.search(r"```json\n(.*?)```", README, re.S)[1])
GOLDEN = [*(ROOT / "torchserve" / "golden").glob("*.png")]  # what the README classifies
METRICS = json.loads((ROOT / "metrics" / "test_metrics.json").read_text())
MEASURED, INT8 = rows_of("benchmarks.md"), rows_of("formats.md")["onnx-int8"]
OWN, PEER = MEASURED["this project"], MEASURED["FastAPI + uvicorn"]


@pytest.mark.parametrize("command", CURL)
def test_curl_command(server, command):
    """Each line answers 2xx from a real server; only the ports differ."""
    for port, address in ((8080, server.inference), (8081, server.management), (8082, server.metrics)):
        command = command.replace(f"localhost:{port}", address.removeprefix("http://"))
    command = command.replace("curl ", "curl -sS --fail ", 1)
    answer = run_script(server.root, "bash", "-c", command)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    if "bag_1.png" in command:
        assert json.loads(answer.stdout)["predicted_label"] == "Bag"
    if "sample_input" in command:
        assert_same_answer(json.loads(answer.stdout), SHOWN_ANSWER)


def assert_same_answer(found: dict, shown: dict) -> None:
    """Equal but for the last digits of the probabilities."""
    assert found.keys() == shown.keys()
    for key, value in shown.items():
        assert found[key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-4))


def test_pipeline_commands_and_snippet(tmp_path, mirror):
    """The commands that need no server run in order as written, on less data; then the snippet finds their run."""
    root = copy_checkout(tmp_path / "checkout")
    shrink_experiment(root)
    environment = {
        "DATA_MIRROR": str(mirror),
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    for command in LOCAL:
        done = run_script(root, "bash", "-c", command, **environment)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert len((root / "predictions.csv").read_text().splitlines()) == 1 + len(GOLDEN)
    found = run_script(root, sys.executable, "-c", SNIPPET)
    assert found.returncode == 0, found.stderr
    accuracy = json.loads((root / "models/best_model/config.json").read_text())["metrics"]["test_accuracy"]
    assert f"{accuracy:.4f}"[:5] in found.stdout


def test_make_test_is_pytest_once_the_serving_environment_is_there(checkout):
    """Not in the first test that starts a server: its time limit is no measure of a download."""
    plan = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    script = "scripts/make_serving_environment.sh"
    assert re.search(rf"^{script}$.*pytest tests/ -v", plan.stdout, re.S | re.M)
    for _ in range(2):
        made = run_script(checkout, script)
        assert made.returncode == 0, made.stderr
    assert "Environment torchserve/.venv is there" in made.stdout


@pytest.mark.parametrize("nginx", [False, True])
def test_a_fresh_debian_gets_what_the_checks_need(nginx, tmp_path):
    """.ci/run on a path that holds as little; apt-get and systemctl there only write down what is asked of them."""
    asked, script = tmp_path / "asked", tmp_path / "project" / ".ci" / "run"
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name))
    note = f'echo "$@" >>{asked}'
    for name, line in {"id": "echo 0", "python3": "exit 1", "apt-get": note, "systemctl": note}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "sbin").mkdir()
    if nginx:
        shutil.copy(tmp_path / "id", tmp_path / "sbin" / "nginx")
    script.parent.mkdir(parents=True)
    script.write_text((ROOT / ".ci" / "run").read_text().replace("/usr/sbin", f"{tmp_path}/sbin"))
    done = run_script(tmp_path, "bash", str(script), PATH=str(tmp_path))
    assert done.returncode == 127  # nothing was installed
    wanted = {"curl", "make", "python3-venv", "wrk", "prometheus", "g++", "openjdk-17-jdk-headless"}
    assert wanted <= set(asked.read_text().split())
    assert ("nginx-light" in asked.read_text()) is not nginx
    assert ("disable --quiet --now nginx" in asked.read_text()) is not nginx, "one that was there goes on"
    assert "disable --quiet --now prometheus prometheus-node-exporter" in asked.read_text()


@pytest.mark.parametrize("name", ["input/a.jpg", "output/predictions.csv", "predictions.csv", "photos/a.jpg"])
def test_a_shops_photos_and_their_categories_are_not_committed(name):
    """They lie where README.md, docs/experiments.md and docker-run-example.sh put them."""
    assert run_script(ROOT, "git", "check-ignore", name).returncode == 0
    assert run_script(ROOT, "git", "check-ignore", "README.md").returncode == 1


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ("accuracy", METRICS["accuracy"]),
        ("macro F1", METRICS["macro_f1"]),
        ("top-3 accuracy", METRICS["top_3_accuracy"]),
        ("precision, worst class", min(entry["precision"] for entry in METRICS["per_class"].values())),
        ("recall, worst class", min(entry["recall"] for entry in METRICS["per_class"].values())),
        ("calibration error (ECE, 15 bins)", METRICS["expected_calibration_error"]),
    ],
)
def test_figure_is_measured(row, value):
    shown = re.search(rf"^\| {re.escape(row)} \| ([\d.]+)", README, re.M)[1]
    assert float(shown) == pytest.approx(value, abs=0.00005)


@pytest.mark.parametrize(
    "shown",
    [
        f"answers {OWN['requests/s']} requests/s at p99 {float(OWN['p99 ms']):.0f} ms",
        f"FastAPI with the same model answers {PEER['requests/s']} at {float(PEER['p99 ms']):.0f} ms",
        f"starts in {OWN['cold start s']} seconds and holds {OWN['memory MB']} MB",
        f" {MEASURED['times the best other server']['found']} times the best other server",
        f" {float(MEASURED['share of the in-process limit']['found']):.0%} of the images that the cores classify",
        f" {OWN['p50 ms at 1']} ms for a lone client",
        f"{int(INT8['size, KB']) / 1000:.2f} MB and {float(INT8['latency, ms']):.2f} ms an image on one core in INT8",
        f"accuracy {INT8['accuracy']}, ECE {INT8['ECE']}",
        f"{METRICS['parameters']:,} parameters, {METRICS['multiply_adds'] / 1e6:.1f} M multiply-adds",
    ],
)
def test_figure_is_that_of_the_page_which_a_command_wrote(shown):
    """docs/benchmarks.md, docs/formats.md and metrics/test_metrics.json hold what was measured."""
    assert shown in " ".join(README.split())


def test_tree_and_links_exist():
    for line in TREE.splitlines():
        for name in re.split(r"\s{2,}", line)[:-1]:
            assert (ROOT / name.strip()).exists(), name
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_missed_target_is_named():
    """The README does not hide a target that the shipped model misses."""
    for sentence in METRICS["targets_missed"]:
        subject = sentence.split(" is ")[0].replace("_", " ")
        assert subject.lower() in README.lower(), sentence
