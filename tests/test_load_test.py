"""python -m src.serving.load_test: what it sends, how it judges, and a short run against a real server."""

import json
import os
import socket
import sys
from collections import Counter
from itertools import islice

import numpy as np
import psutil
import pytest

from src.serving.load_requests import (
    FORMS,
    Shot,
    bad_shots,
    draw_images,
    encode_png,
    find_fault,
    load_images,
    mix,
    pack,
)
from src.serving.load_test import LIMITS, conclude, find_images, judge, main, show, summarize
from src.serving.load_users import Answer, Usage
from src.serving.ports import free_ports
from src.serving.processes import family, memory, processor_seconds, server_process
from tests.conftest import DRAWN, ROOT, run_script

GOOD = Shot("raw", b"", "image/png", 1)
BAD = Shot("bad", b"", "image/png", bad=True)
RIGHT = {
    "predicted_class": 1,
    "predicted_label": "b",
    "confidence": 0.75,
    "probabilities": {"a": 0.25, "b": 0.75},
}
FINE = [Answer(index / 100, 0.01, "raw", "", True) for index in range(1000)]
CALM = Usage([0.3, 0.5], [500_000_000, 600_000_000])


def missed(answers: list[Answer], usage: Usage = CALM, rate: float = 100) -> set[str]:
    """The promises that were not kept in ten seconds with these answers."""
    return {verdict.name for verdict in judge(summarize(answers, usage, 10), rate) if verdict.kept is False}


def test_figures():
    figures = summarize(FINE, CALM, 10)
    assert figures["requests_per_second"] == 100
    assert figures["mean_ms"] == pytest.approx(10)
    assert (figures["failures"], figures["accuracy"]) == (0, 1)
    assert figures["cpu"] == pytest.approx(0.4)
    assert figures["memory_mb"] == 600
    assert missed(FINE) == set()


@pytest.mark.parametrize(
    ("answers", "usage", "names"),
    [
        ([Answer(0, 0.21, "raw", "")] * 1000, CALM, {"mean_ms"}),
        ([Answer(0, 0.01, "raw", "")] * 940 + [Answer(0, 0.4, "raw", "")] * 60, CALM, {"p95_ms"}),
        (FINE[:989] + [Answer(0, 0.01, "raw", "no answer")] * 11, CALM, {"failures"}),
        (FINE[:990] + [Answer(0, 0.01, "raw", "no answer")] * 10, CALM, set()),
        (FINE, Usage([0.71], [1]), {"cpu"}),
        (FINE, Usage([0.1], [2_000_000_001]), {"memory_mb"}),
        (FINE[:949], CALM, {"requests_per_second"}),
        ([], Usage(), {"mean_ms", "p95_ms", "failures", "requests_per_second"}),
    ],
)
def test_each_promise_is_missed_alone(answers, usage, names):
    assert missed(answers, usage) == names


def test_what_cannot_be_measured_is_neither_kept_nor_missed():
    figures = summarize(FINE, Usage(), 10)
    verdicts = judge(figures, 100)
    assert [verdict.name for verdict in verdicts if verdict.kept is None] == ["cpu", "memory_mb"]
    assert show(figures, verdicts).count("not measured  the server's processes are not to be seen from here") == 2
    assert conclude(verdicts) == ("not measured: cpu, memory_mb; the other promises are kept", 3)
    assert conclude(judge(summarize(FINE, CALM, 10), 100)) == ("every promise kept", 0)
    assert conclude(judge(summarize(FINE[:900], Usage(), 10), 100)) == ("a promise was missed", 1)


@pytest.mark.parametrize(
    ("shot", "status", "content", "fault"),
    [
        (GOOD, 200, RIGHT, ""),
        (BAD, 400, {"code": 400, "message": "no image"}, ""),
        (BAD, 200, RIGHT, "a bad request got 200"),
        (BAD, 503, {}, "a bad request got 503"),
        (BAD, 400, {}, "no message"),
        (GOOD, 400, {"message": ""}, "a good request got 400"),
        (GOOD, 0, None, "no answer"),
        (GOOD, 200, {"predicted_class": 1}, "misses"),
        (GOOD, 200, RIGHT | {"predicted_label": "a"}, "not the most probable"),
        (GOOD, 200, RIGHT | {"confidence": 0.5}, "not the most probable"),
        (GOOD, 200, RIGHT | {"probabilities": {"a": 0.5, "b": 0.75}}, "do not sum to 1"),
        (GOOD, 200, RIGHT | {"predicted_label": "c"}, "not the most probable"),
        (GOOD, 200, [RIGHT], "misses"),
        (GOOD, 200, RIGHT | {"probabilities": {"a": None, "b": 1.0}}, "not a number for each class"),
        (GOOD, 200, RIGHT | {"probabilities": {}}, "not a number for each class"),
        (GOOD, 200, RIGHT | {"predicted_label": ["b"]}, "no label"),
    ],
)
def test_fault_of_an_answer(shot, status, content, fault):
    found = find_fault(shot, status, json.dumps(content).encode())
    assert fault in found
    assert bool(found) == bool(fault)


def test_an_answer_that_is_no_json():
    assert find_fault(GOOD, 200, b"<html>") == "the answer is no JSON"


def test_mix_has_every_form_and_its_share_of_bad_ones():
    images = draw_images(4)
    forms = Counter(shot.form for shot in islice(mix(images, np.arange(4), 0.02), 3000))
    assert 30 < forms["bad"] < 90
    assert {forms[form] for form in FORMS} <= {(3000 - forms["bad"]) // 3, (3000 - forms["bad"]) // 3 + 1}


def test_every_form_is_answered_as_it_should_be(server):
    """The server takes each form, and refuses each bad request with 400."""
    png = encode_png(draw_images(1)[0])
    for shot in [*(pack(png, form) for form in FORMS), *bad_shots(png)]:
        answer = server.predict(shot.body, headers={"Content-Type": shot.content_type})
        assert find_fault(shot, answer.status_code, answer.content) == "", shot


def test_images_are_real_ones_where_there_are_any(drawn, mirror, tmp_path):
    images, labels, source = load_images(drawn / "test.npz", None)
    assert len(images) == len(labels) == DRAWN["test"]
    images, labels, source = load_images(tmp_path / "none.npz", mirror)
    assert images.shape == (10000, 1, 28, 28)
    assert "mirror" in source
    images, labels, source = load_images(tmp_path / "none.npz", None)
    assert set(labels) == {-1}
    assert "drawn images, because" in source


def test_another_model_gets_images_of_its_own(mirror, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_MIRROR", str(mirror))
    assert "mirror" in find_images("fashion_mnist", None)[2]
    images, labels, source = find_images("clothing_small", None)
    assert set(labels) == {-1}
    assert "because data/clothing_small/test.npz does not exist" in source
    (tmp_path / "data" / "clothing_small").mkdir(parents=True)
    np.savez(tmp_path / "data" / "clothing_small" / "test.npz", images=images, labels=np.arange(len(images)))
    assert list(find_images("clothing_small", None)[1]) == list(range(len(images)))


def test_a_short_run(server, drawn, tmp_path):
    arguments = ["--inference", server.inference, "--management", server.management, "--rate", "20"]
    arguments += ["--duration", "4", "--data", str(drawn / "test.npz"), "--output", str(tmp_path)]
    done = run_script(ROOT, sys.executable, "-m", "src.serving.load_test", *arguments)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # how fast the machine is does not matter here
    report = json.loads((tmp_path / "load_test.json").read_text())
    assert report["figures"]["failures"] == 0, done.stdout
    assert report["figures"]["forms"].keys() >= set(FORMS)
    assert report["figures"]["accuracy"] is not None
    assert {verdict["name"] for verdict in report["verdicts"]} == {*LIMITS, "requests_per_second"}
    assert report["figures"]["memory_mb"] > 100, "the server's processes were not seen"
    assert (done.returncode == 0) == all(verdict["kept"] for verdict in report["verdicts"])
    page = (tmp_path / "load_test.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 4


def test_without_a_server(capsys):
    (port,) = free_ports(1)
    assert main(["--management", f"http://127.0.0.1:{port}"]) == 2
    assert "start a server with ./run_torchserve.sh" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rate", "--duration"])
@pytest.mark.parametrize("value", ["0", "nan", "inf"])
def test_a_value_that_cannot_be(option, value, capsys):
    with pytest.raises(SystemExit):
        main([option, value])
    assert f"{option} is {value}; it must be above 0" in capsys.readouterr().err


def test_what_cannot_be_read_or_written_is_said_before_the_load(server, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("text")
    np.savez(tmp_path / "other.npz", pixels=[1])
    address = ["--management", server.management, "--inference", server.inference]
    for arguments, said in (
        (["--data", f"{tmp_path}/file"], "holds no images and labels"),
        (["--data", f"{tmp_path}/other.npz"], "holds no images and labels"),
        (["--output", f"{tmp_path}/file"], "File exists"),
    ):
        assert main([*address, *arguments]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("TORCHSERVE_CERTIFICATE", f"{tmp_path}/gone.pem")
    assert main([*address, "--output", f"{tmp_path}/folder"]) == 2
    assert "gone.pem" in capsys.readouterr().err


def test_locust_patches_nothing_and_counts_requests_without_an_answer():
    (port,) = free_ports(1)
    code = f"""
import itertools, socket, sys
from src.serving.load_requests import Shot
from src.serving.load_users import run_users
assert "gevent" not in sys.modules
plain = socket.socket
shots = itertools.repeat(Shot("raw", b"x", "image/png"))
answers, usage = run_users("http://127.0.0.1:{port}/x", shots, 10, 1, "", None)
assert socket.socket is plain and usage.cpu == []
assert answers and {{answer.fault for answer in answers}} == {{"no answer"}}, answers
"""
    done = run_script(ROOT, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_processes_are_found_and_measured():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://localhost:{listener.getsockname()[1]}"
        found = server_process(url, {os.getpid()})
        assert server_process(url, {os.getppid()}) is None, "a proxy before the server"
    assert found == psutil.Process(os.getpid())
    assert server_process("http://192.0.2.1:8080", set()) is None
    assert memory([found]) > 1e6
    assert processor_seconds([found])[found.pid] > 0
    assert found in family(found)
