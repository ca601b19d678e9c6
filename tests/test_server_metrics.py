"""What :8082/metrics says after known requests: each of our metrics moves by the right amount."""

import re
import time
from collections import defaultdict

import pytest
import requests

from src.inference.report import REPORT_EVERY
from tests.conftest import TIMEOUT
from tests.drawing import encode
from tests.sent_inputs import BLANK, OTHER, PNG, as_base64, as_json
from tests.waiting import wait_until

SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


def scrape(server) -> dict[tuple[str, str], float]:
    """Value by (metric, label): the class, reason or stage where there is one, else ''."""
    text = requests.get(f"{server.metrics}/metrics", timeout=TIMEOUT).text
    values: dict[tuple[str, str], float] = defaultdict(float)
    for name, labels, value in SAMPLE.findall(text):
        found = dict(LABEL.findall(labels))
        if "le" not in found:
            label = next((found[key] for key in ("Class", "Reason", "Stage") if key in found), "")
            values[name, label] += float(value)
    return values


def settled(server) -> dict[tuple[str, str], float]:
    """What ``scrape`` gives once nothing that was asked before is still to be reported."""
    ours = {"Predictions", "UncertainPredictions", "RejectedInputs", "StageSeconds_count", "Confidence_count"}
    before, deadline = None, time.monotonic() + TIMEOUT
    while True:
        time.sleep(4 * REPORT_EVERY)
        now = scrape(server)
        if before == (before := {key: value for key, value in now.items() if key[0] in ours}):
            return now
        assert time.monotonic() < deadline


def moved(server, before: dict, wanted: dict) -> dict:
    """How much each of ``wanted`` has moved; waits, a bounded time, since workers report after they answer."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        now = scrape(server)
        change = {key: now[key] - before[key] for key in wanted}
        if change == wanted or time.monotonic() > deadline:
            return change
        time.sleep(0.1)


def test_our_metrics_move_by_the_right_amounts(server):
    first, second = (server.predict(body).json() for body in (PNG, encode(OTHER)))
    before = settled(server)
    for _ in range(3):
        server.predict(PNG)
    server.predict(as_json(images=[as_base64(PNG), as_base64(encode(OTHER))]))
    for body in (b"hello", b"", b"{}", b"{"):
        assert server.predict(body).status_code == 400
    labels = [first["predicted_label"]] * 4 + [second["predicted_label"]]
    wanted = {("Predictions", label): float(labels.count(label)) for label in set(labels)}
    wanted |= {("RejectedInputs", reason): 1.0 for reason in ("not_an_image", "empty", "no_image", "bad_json")}
    assert moved(server, before, wanted) == wanted


def test_uncertain_answers_are_counted(server):
    certain, blank = server.predict(PNG).json(), server.predict(BLANK).json()
    assert (certain["uncertain"], blank["uncertain"]) == (False, True)
    before = settled(server)
    server.predict(PNG)
    server.predict(as_json(images=[as_base64(BLANK), as_base64(PNG), as_base64(BLANK)]))
    wanted = {("UncertainPredictions", blank["predicted_label"]): 2.0}
    wanted[("UncertainPredictions", certain["predicted_label"])] = 0.0
    assert moved(server, before, wanted) == wanted


def test_a_worker_samples_its_times_and_confidences(server):
    confidence = server.predict(PNG).json()["confidence"]
    before = settled(server)  # so that what follows is a sample of its own
    server.predict(PNG)
    wanted = {("StageSeconds_count", stage): 1.0 for stage in ("decode", "inference", "encode")}
    wanted[("Confidence_count", "")] = 1.0
    assert moved(server, before, wanted) == wanted
    now = scrape(server)
    assert now["Confidence_sum", ""] - before["Confidence_sum", ""] == pytest.approx(confidence, abs=1e-4)
    for stage in ("decode", "inference", "encode"):
        assert now["StageSeconds_sum", stage] > before["StageSeconds_sum", stage]
    for _ in range(200):
        server.predict(PNG)
    wanted = {("Predictions", server.predict(PNG).json()["predicted_label"]): 201.0}
    assert moved(server, now, wanted) == wanted
    assert 1 <= scrape(server)["Confidence_count", ""] - now["Confidence_count", ""] < 200


def test_metrics_by_status(server):
    before = scrape(server)
    server.predict(PNG)
    server.predict(b"hello")
    wanted = {("Requests4XX", ""): 1.0, ("Requests5XX", ""): 0.0, ("ts_inference_requests_total", ""): 2.0}
    assert moved(server, before, wanted) == wanted
    assert scrape(server)["Requests2XX", ""] > before["Requests2XX", ""]  # these reads count there as well


def test_the_description_is_not_counted_as_work(server):
    before = settled(server)
    requests.get(f"{server.management}/models/fashion_mnist?customized=true", timeout=TIMEOUT)
    server.predict(PNG)
    wanted = {("StageSeconds_count", "decode"): 1.0, ("Confidence_count", ""): 1.0}
    assert moved(server, before, wanted) == wanted


def test_torchserves_own_gauge_still_tells_the_time_of_a_batch(server):
    server.predict(PNG)
    assert wait_until(lambda: scrape(server)["PredictionTime", ""]) < 10_000  # milliseconds
