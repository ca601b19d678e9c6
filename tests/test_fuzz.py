"""Mutated requests against a running TorchServe: each is answered, none with 5xx, and the good ones between are right.

1,000 in the suite; ``make soak`` sends 20,000 (FUZZ_REQUESTS).
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzzing import Sender, Sent, requests_as_nobody_should_send_them
from tests.sent_inputs import PNG, as_base64, as_json

EXAMPLES = int(os.environ.get("FUZZ_REQUESTS", "1000"))
GOOD = [Sent(PNG), Sent(as_json(image=as_base64(PNG)), {"Content-Type": "application/json"})]


@pytest.fixture(scope="module")
def sender(server):
    """Sends to the server; in the end the workers must be those of the beginning, and READY."""
    before = [(worker["id"], worker["pid"]) for worker in server.describe()["workers"]]
    sender = Sender(server.inference.removeprefix("http://"))
    yield sender
    sender.connection.close()
    workers = server.describe()["workers"]
    assert [(worker["id"], worker["pid"]) for worker in workers] == before
    assert {worker["status"] for worker in workers} == {"READY"}
    print(f"\nanswers: {dict(sender.seen)}")


@pytest.fixture(scope="module")
def expected(server) -> dict:
    return server.predict(PNG).json()["probabilities"]


@pytest.mark.timeout(0)
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(sent=requests_as_nobody_should_send_them())
def test_no_request_brings_a_5xx_or_a_wrong_answer_to_another(sender, expected, sent):
    status, answer = sender.send(sent)
    assert status < 500, (status, answer)
    if status == 400:
        assert answer.keys() == {"code", "type", "message"}
    if sender.seen.total() % 10 == 0:
        for good in GOOD:
            status, answer = sender.send(good)
            assert status == 200
            assert answer["probabilities"] == pytest.approx(expected, abs=1e-5)
