"""Every form of input against a running TorchServe: right answers, 400s that say what is wrong, and no harm done."""

import json
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.conftest import TIMEOUT
from tests.drawing import encode
from tests.sent_inputs import OTHER, PNG, as_base64, as_json, bad_bodies, json_forms, variants

BAD, VARIANTS, JSON_FORMS = bad_bodies(), variants(), json_forms()
ANSWER_KEYS = {"predicted_class", "predicted_label", "confidence", "uncertain", "probabilities", "model_version"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module", autouse=True)
def _no_worker_restarts(server):
    """The workers after all these inputs are the workers before them."""
    before = [(worker["id"], worker["pid"], worker["startTime"]) for worker in server.describe()["workers"]]
    yield
    workers = server.describe()["workers"]
    assert [(worker["id"], worker["pid"], worker["startTime"]) for worker in workers] == before
    assert {worker["status"] for worker in workers} == {"READY"}


@pytest.fixture(scope="module")
def expected(server):
    """The answer for PNG."""
    return server.predict(PNG).json()


def assert_answer(response: requests.Response, wanted: dict) -> None:
    """200 with the prediction ``wanted``; probabilities within 1e-5, for the size of a batch changes the rounding."""
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert_same(response.json(), wanted)


def assert_same(answer: dict, wanted: dict) -> None:
    assert answer.keys() == ANSWER_KEYS
    assert answer["predicted_label"] == wanted["predicted_label"]
    assert answer["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)


def assert_error(response: requests.Response, reasons: set[str], part: str) -> None:
    """400 with the three keys of an error."""
    assert response.status_code == 400, response.text
    error = response.json()
    assert error.keys() == {"code", "type", "message"}
    assert error["code"] == 400
    assert error["type"] in reasons
    assert part in error["message"]


def test_the_sample_is_a_trouser(server, sample):
    answer = server.predict(as_json(**sample), headers=JSON).json()
    assert answer.keys() == ANSWER_KEYS
    assert answer["predicted_label"] == "Trouser"
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["confidence"] == answer["probabilities"]["Trouser"]
    assert list(answer["probabilities"])[answer["predicted_class"]] == "Trouser"


@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_forms(server, expected, form):
    assert_answer(server.predict(JSON_FORMS[form], headers=JSON), expected)


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", "application/json", "text/plain", ";", None])
def test_raw_bytes_of_any_content_type(server, expected, kind):
    headers = {"Content-Type": kind} if kind else {}
    assert_answer(server.predict(PNG, headers=headers), expected)
    assert_answer(server.predict(JSON_FORMS["plain"], headers=headers), expected)


def test_curl_sends_files(server, expected, tmp_path):
    (tmp_path / "image.png").write_bytes(PNG)
    url = f"{server.inference}/predictions/fashion_mnist"
    forms = [["-T", "image.png"], ["-X", "POST", "-T", "image.png"], ["-F", "data=@image.png"],
             ["--data-binary", "@image.png", "-H", "Content-Type: image/png"],
             ["--data-binary", "@image.png", "-H", "Content-Type:"], ["--data-binary", "@image.png"],
             ["-T", "image.png", "-H", "Transfer-Encoding: chunked"]]  # fmt: skip
    for form in forms:
        done = subprocess.run(["curl", "-sS", "-m", "30", url, *form], cwd=tmp_path, capture_output=True, timeout=60)
        assert_same(json.loads(done.stdout), expected)


@pytest.mark.parametrize("field", ["data", "image", "any name", "body", "ünï", "describe"])
def test_multipart_under_any_name(server, expected, field):
    assert_answer(server.predict(files={field: ("image.png", PNG, "image/png")}), expected)
    assert_answer(server.predict(files={field: ("x.json", JSON_FORMS["plain"], "application/json")}), expected)
    assert_answer(server.predict(files={field: (None, JSON_FORMS["plain"])}), expected)  # a text field


def test_a_text_field_beside_a_file_is_no_image(server, expected):
    files = [("id", (None, "7")), ("data", ("image.png", PNG)), ("other", (None, JSON_FORMS["plain"]))]
    assert_answer(server.predict(files=files), expected)


def test_several_images_answer_a_list(server, expected):
    other = server.predict(encode(OTHER)).json()
    texts = [as_base64(PNG), as_base64(encode(OTHER)), as_base64(PNG)]
    answers = server.predict(as_json(images=texts), headers=JSON).json()
    for answer, wanted in zip(answers, [expected, other, expected], strict=True):
        assert_same(answer, wanted)
    for names in (("first", "second"), ("same", "same")):
        files = [(name, ("x.png", data)) for name, data in zip(names, (encode(OTHER), PNG), strict=True)]
        for answer, wanted in zip(server.predict(files=files).json(), [other, expected], strict=True):
            assert_same(answer, wanted)
    assert len(server.predict(as_json(images=texts[:1] * 64), headers=JSON).json()) == 64


@pytest.mark.parametrize("name", VARIANTS)
def test_special_files(server, name):
    special, plain = VARIANTS[name]
    assert_answer(server.predict(special), server.predict(plain).json())


def test_a_large_file(server, expected):
    padded = as_json(image=as_base64(PNG) + "\n" * 7_000_000)
    assert_answer(server.predict(padded, headers=JSON), expected)
    assert_answer(server.predict(files={"data": padded}), expected)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(server, name):
    body, reasons, part = BAD[name]
    assert_error(server.predict(body), reasons, part)
    assert_error(server.predict(files={"data": ("x", body)}), reasons, part)


def test_bad_inputs_among_good_ones(server, expected):
    """All at once, so that they share batches: each good one is right, each bad one gets its own error."""
    jobs = [(body, reasons, part) for body, reasons, part in BAD.values()] + [None] * len(BAD)
    jobs = [job for pair in zip(jobs[: len(BAD)], jobs[len(BAD) :], strict=True) for job in pair]
    barrier = threading.Barrier(len(jobs))

    def send(job):
        barrier.wait(timeout=TIMEOUT)
        return server.predict(job[0] if job else PNG)

    with ThreadPoolExecutor(len(jobs)) as clients:
        for _ in range(3):
            for job, response in zip(jobs, clients.map(send, jobs), strict=True):
                if job:
                    assert_error(response, *job[1:])
                else:
                    assert_answer(response, expected)


def test_what_curl_sends_unasked_is_no_hindrance(server, expected):
    """``curl -d`` and ``--data-binary`` say that the body is URL-encoded, which it is not."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for body in (JSON_FORMS["plain"], PNG):
        assert_answer(server.predict(body, headers=form), expected)
    assert_error(server.predict(b"a=%zz", headers=form), {"not_an_image"}, "it starts with 61 3d 25")
    assert_error(server.predict(b"", headers=form), {"empty"}, "empty (0 bytes)")


def test_forms_that_are_none(server, expected):
    form = {"Content-Type": "multipart/form-data; boundary=xx"}
    head = b'--xx\r\nContent-Disposition: form-data; name="data"; filename="a.png"\r\n\r\n'
    unnamed = b"--xx\r\n\r\n" + PNG + b"\r\n--xx--\r\n"
    for body, kind, part in (
        (b"", "empty", "empty (0 bytes)"),
        (b"--xx--\r\n", "empty", "the form has no field"),
        (head, "broken_form", "the form cannot be taken apart: "),
        (head + PNG, "broken_form", "send an image with -F"),
        (head + PNG + b"\r\n" + head, "broken_form", ""),  # nothing of it is answered
        (unnamed, "broken_form", "Missing Content-Disposition"),
    ):
        assert_error(server.predict(body, headers=form), {kind}, part)
    for kind in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=other"):
        assert_error(server.predict(head + PNG, headers={"Content-Type": kind}), {"not_an_image"}, "")
        assert_answer(server.predict(PNG, headers={"Content-Type": kind}), expected)
    assert_error(server.predict(files={"data": ("a.png", b"")}), {"empty"}, "empty (0 bytes)")
    assert_error(server.predict(files={"good": PNG, "bad": b"hello"}), {"not_an_image"}, "image 1: not an image")


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=a"])
def test_a_form_of_many_fields_disturbs_nobody(server, expected, kind):
    """CVE-2024-29025: 8 MB of ``a&`` ended the Java, when it took forms apart itself."""
    field = b'--a\r\nContent-Disposition: form-data; name="a"\r\n\r\n{\r\n'
    for body in (b"a&" * (8 << 20), field * (16 << 14)):
        assert_error(server.predict(body, headers={"Content-Type": kind}), {"not_an_image", "broken_form"}, "")
        assert_answer(server.predict(PNG), expected)


def test_limits(server, expected):
    assert server.predict(b"x" * 33_554_433).status_code == 413
    assert server.predict(PNG, headers={"X-Long": "a" * 9000}).status_code == 400
    assert_answer(server.predict(PNG, headers={"X-Long": "a" * 7000}), expected)


@pytest.mark.parametrize(
    "headers",
    [
        {"describe": "True"},
        {"hold-until": "99999999999"},
        {"describe": "True", "hold-until": "99999999999", "refuse": "True"},
        {"X-Odd": b"\xff\xfe\xe9"},
        {"X-Empty": ""},
        {"body": "x", "data": "y"},
        {"ts_request_sequence_id": "1", "ts_request_sequence_start": "true"},
        {"x-request-id": "same", "x-request-id-prefix": "same"},
        {"Content-Encoding": "gzip"},
    ],
    ids=str,
)
def test_odd_headers_change_nothing(server, expected, headers):
    with ThreadPoolExecutor(4) as clients:
        for response in clients.map(lambda _: server.predict(PNG, headers=headers), range(4)):
            assert_answer(response, expected)
    form = {"Content-Type": "multipart/form-data; boundary=xx"}
    assert_error(server.predict(b"--xx--\r\n", headers=headers | form), {"empty"}, "no field")


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "POST"])
def test_no_body_by_any_method(server, method):
    response = requests.request(method, f"{server.inference}/predictions/fashion_mnist", timeout=TIMEOUT)
    assert_error(response, {"empty"}, "empty (0 bytes)")


@pytest.mark.parametrize("path", ["predictions/nothing", "predictions/fashion_mnist/9.9", "predictions", "nothing"])
def test_unknown_paths(server, path):
    response = requests.post(f"{server.inference}/{path}", data=PNG, timeout=TIMEOUT)
    assert response.status_code == 404
    assert response.json().keys() == {"code", "type", "message"}


def test_a_client_that_hangs_up(server, expected):
    host, port = server.inference.removeprefix("http://").split(":")
    head = b"POST /predictions/fashion_mnist HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(PNG)
    for part in (head, head + PNG[:50], head + PNG, b"\x00\xff\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as client:
            client.sendall(part)
    assert_answer(server.predict(PNG), expected)
