"""Mutated requests against a running TorchServe: each is answered, none with 5xx, and the good ones beside are right.

1,000 in the suite; ``make soak`` sends 20,000 (FUZZ_REQUESTS).
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzzing import Sender, requests_as_nobody_should_send_them
from tests.sent_inputs import PNG, as_base64, as_json
from tests.traffic import Traffic

EXAMPLES = int(os.environ.get("FUZZ_REQUESTS", "1000"))
GOOD = (PNG, as_json(image=as_base64(PNG)))


@pytest.fixture(scope="module")
def sender(server):
    """Sends to the server while others send good requests, which come into the same batches and must be answered
    rightly; in the end the workers must be those of the beginning, and READY."""
    before = [(worker["id"], worker["pid"]) for worker in server.describe()["workers"]]
    sender = Sender(server.inference.removeprefix("http://"))
    with Traffic(f"{server.inference}/predictions/fashion_mnist", bodies=GOOD) as traffic:
        yield sender
    sender.connection.close()
    assert traffic.seen.keys() == {server.describe()["modelVersion"]}, traffic.seen
    assert traffic.seen.total() > EXAMPLES / 10
    workers = server.describe()["workers"]
    assert [(worker["id"], worker["pid"]) for worker in workers] == before
    assert {worker["status"] for worker in workers} == {"READY"}
    print(f"\nanswers: {dict(sender.seen)}; beside them {traffic.seen.total()} good requests, answered rightly")


@pytest.mark.timeout(0)
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(sent=requests_as_nobody_should_send_them())
def test_no_request_brings_a_5xx_or_a_wrong_answer_to_another(sender, sent):
    status, answer = sender.send(sent)
    assert status < 500, (status, answer)
    if status == 400:
        assert answer.keys() == {"code", "type", "message"}
