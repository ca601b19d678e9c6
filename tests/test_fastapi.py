"""What the FastAPI server answers: the same as TorchServe, and what it adds."""

import http.client
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import requests

from src.inference import Predictor
from src.serving.fastapi_requests import MAX_BODY
from src.serving.fastapi_service import Service
from tests.conftest import ROOT, RUNTIME, TIMEOUT
from tests.drawing import encode
from tests.fastapi_run import check_metrics, line_of, lines_of, running
from tests.sent_inputs import OTHER, PICTURE, PNG, as_base64, as_json, bad_bodies, json_forms, variants

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=xx"}
URL_ENCODED = {"Content-Type": "application/x-www-form-urlencoded"}
TEXT = as_base64(PNG)
LARGE = encode(PICTURE.resize((4000, 4000)), compress_level=1)
BOTH = as_json(images=[TEXT, as_base64(encode(OTHER))])
# What both servers get: a body or a form, and headers.
GOOD = {
    "raw": (PNG, None, {}),
    "raw, of another type": (PNG, None, {"Content-Type": "text/plain"}),
    "large": (LARGE, None, {}),
    "JSON, type unsaid": (json_forms()["plain"], None, {}),
    "two in JSON": (BOTH, None, JSON),
    "64 in JSON": (as_json(images=[TEXT] * 64), None, JSON),
    "field": (None, {"data": ("a.png", PNG)}, {}),
    "field of an odd name": (None, {"ünï": ("a.png", PNG)}, {}),
    "field that is no file": (None, {"data": (None, PNG)}, {}),
    "field with JSON": (None, {"x": (None, BOTH)}, {}),
    "text beside a file": (None, {"id": (None, "7"), "data": ("a.png", PNG)}, {}),
    "two fields": (None, {"one": ("a.png", PNG), "two": ("b.png", encode(OTHER))}, {}),
    "two fields of one name": (None, [("files", ("a.png", PNG)), ("files", ("b.png", encode(OTHER)))], {}),
    "form that is none": (PNG, None, FORM),
    "url-encoded, as curl says": (json_forms()["plain"], None, URL_ENCODED),
}
GOOD |= {f"JSON, {name}": (body, None, JSON) for name, body in json_forms().items()}
GOOD |= {name: (special, None, {}) for name, (special, _) in variants().items()}
PART = b'--xx\r\nContent-Disposition: form-data; name="data"; filename="a.png"\r\n\r\n'
BAD = {name: (body, None, {}) for name, (body, _, _) in bad_bodies().items()} | {
    "form without a field": (b"--xx--\r\n", None, FORM),
    "cut form": (PART + PNG, None, FORM),
    "form without a boundary": (PART + PNG, None, {"Content-Type": "multipart/form-data"}),
    "empty file": (None, {"data": ("a.png", b"")}, {}),
    "bad field after a good one": (None, {"good": ("a.png", PNG), "bad": ("b.png", b"hello")}, {}),
    "65 fields": (None, {f"n{number}": ("a.png", PNG) for number in range(65)}, {}),
    "part without a header": (b"--xx\r\n\r\n" + PNG + b"\r\n--xx--\r\n", None, FORM),
    "url-encoded and empty": (b"", None, URL_ENCODED),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """What the module's server writes."""
    return tmp_path_factory.mktemp("fastapi") / "log.jsonl"


@pytest.fixture(scope="module")
def url(log) -> Iterator[str]:
    """The address of a server with one process."""
    with running(log, "--threads", "2") as (address, _):
        yield address


def send(url: str, body, form, headers: dict) -> requests.Response:
    return requests.post(url, body, files=form, headers=headers, timeout=TIMEOUT)


def without_last_digits(content):
    """JSON whose numbers compare within 1e-5: TorchServe puts requests into batches, which changes the rounding."""
    if isinstance(content, list):
        return [without_last_digits(item) for item in content]
    if isinstance(content, dict):
        return {key: without_last_digits(value) for key, value in content.items()}
    return pytest.approx(content, abs=1e-5) if isinstance(content, float) else content


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_same_answer_as_torchserve(server, url, name):
    sent = (GOOD | BAD)[name]
    wanted = send(f"{server.inference}/predictions/fashion_mnist", *sent)
    answer = send(f"{url}/predict", *sent)
    assert wanted.status_code == (200 if name in GOOD else 400)
    assert (answer.status_code, answer.headers["Content-Type"]) == (wanted.status_code, "application/json")
    assert answer.json() == without_last_digits(wanted.json())
    first = answer.json()[0] if isinstance(answer.json(), list) else answer.json()
    assert list(first) == list(wanted.json()[0] if isinstance(wanted.json(), list) else wanted.json())


@pytest.mark.parametrize(("method", "path"), [("GET", "nothing"), ("POST", "nothing"), ("DELETE", "predict")])
def test_other_paths_and_methods(url, method, path):
    answer = requests.request(method, f"{url}/{path}", timeout=TIMEOUT)
    status, kind = (405, "MethodNotAllowedException") if path == "predict" else (404, "ResourceNotFoundException")
    assert answer.status_code == status
    assert answer.json() == {"code": status, "type": kind, "message": answer.json()["message"]}


def test_put_is_taken_for_post(url):
    assert requests.put(f"{url}/predict", PNG, timeout=TIMEOUT).json()["predicted_label"]


def test_a_request_that_takes_long_is_refused_as_by_torchserve(monkeypatch):
    service = Service(Predictor.load(ROOT / "models" / "best_model", runtime=RUNTIME), RUNTIME, "1.0", 1, 1)
    monkeypatch.setattr("src.inference.requests.LIMITS", ((3600.0, 100),))
    status, content, images = service.classify(PNG, "image/png", 64, False, 0.0)
    assert (status, images) == (503, 0)
    error = orjson.loads(content)
    assert (error["code"], error["type"]) == (503, "busy")
    assert service.classify(encode(OTHER.resize((10, 10))), "image/png", 64, False, 0.0)[0] == 200
    service.pool.shutdown()


def test_batches(url):
    batch = f"{url}/predict/batch"
    one = requests.post(f"{url}/predict", PNG, timeout=TIMEOUT).json()
    files = [("files", ("a.png", PNG))]
    for sent in ((as_json(images=[TEXT] * 10), None), (None, files * 10)):
        answer = send(batch, *sent, {})
        assert (answer.status_code, answer.json()) == (200, without_last_digits([one] * 10))
    assert send(batch, as_json(images=[TEXT]), None, JSON).json() == [without_last_digits(one)]
    assert send(batch, None, files, {}).json() == [without_last_digits(one)]
    for count in (11, 65):
        for sent in ((as_json(images=[TEXT] * count), None), (None, files * count)):
            error = send(batch, *sent, {})
            assert (error.status_code, error.json()["type"]) == (400, "too_many")
            assert f"{count} images, the limit is 10" in error.json()["message"]
    error = send(batch, None, [*files, ("files", ("b.png", b"hello"))], {}).json()
    assert (error["type"], error["message"][:25]) == ("not_an_image", "image 1: not an image in ")


def test_what_it_says_of_itself(url):
    about = requests.get(url, timeout=TIMEOUT).json()
    assert (about["name"], about["version"]) == ("fashion_mnist", "1.0")
    for endpoint in about["endpoints"]:
        method, path = endpoint.split()
        assert requests.request(method, url + path, timeout=TIMEOUT).status_code == (400 if method == "POST" else 200)
    health = requests.get(f"{url}/health", timeout=TIMEOUT).json()
    assert (health["status"], health["classes"], health["runtime"], health["requests"]) == ("ready", 10, RUNTIME, 0)
    assert "swagger" in requests.get(f"{url}/docs", timeout=TIMEOUT).text
    api = requests.get(f"{url}/openapi.json", timeout=TIMEOUT).json()
    assert set(api["paths"]) == {"/", "/health", "/metrics", "/predict", "/predict/batch"}
    predict = api["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {*JSON.values(), "multipart/form-data", "application/octet-stream"}
    assert {"200", "400", "413", "503"} <= set(predict["responses"])
    answer = requests.post(f"{url}/predict", PNG, timeout=TIMEOUT).json()
    assert set(api["components"]["schemas"]["Answer"]["properties"]) == set(answer)


def test_request_ids_and_log(url, log):
    path = "/predict?token=secret"
    for sent, passed in (("my-id", True), ("", False), ("a" * 200, False), ("bad\tid", False)):
        answer = requests.post(url + path, BOTH, headers={"X-Request-ID": sent}, timeout=TIMEOUT)
        shown = answer.headers["X-Request-ID"]
        assert (shown == sent) is passed
        assert len(shown) <= 128
        line = line_of(log, shown)
        assert line.pop("ms") > 0
        assert {key: line[key] for key in ("method", "path", "status", "images")} == {
            "method": "POST",
            "path": "/predict",
            "status": 200,
            "images": 2,
        }
    assert requests.get(f"{url}/nothing", timeout=TIMEOUT).headers["X-Request-ID"]
    assert "secret" not in log.read_text()
    assert TEXT[:40] not in log.read_text()


def test_metrics(url):
    check_metrics(url)


def test_a_body_that_is_too_large(server, url):
    limit = (ROOT / "torchserve" / "config.properties").read_text()
    assert f"max_request_size={MAX_BODY}\n" in limit
    assert server.predict(b"x" * (MAX_BODY + 1)).status_code == 413
    chunks = (b"x" * (1 << 20) for _ in range(MAX_BODY // (1 << 20) + 1))
    for body in (b"x" * (MAX_BODY + 1), chunks):
        answer = requests.post(f"{url}/predict", body, timeout=TIMEOUT)
        assert (answer.status_code, answer.json()["type"]) == (413, "too_large")
    assert requests.post(f"{url}/predict", b"x" * MAX_BODY, timeout=TIMEOUT).status_code == 400
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=TIMEOUT)
    connection.request("POST", "/predict", headers={"Content-Length": str(1 << 40)})  # a body that never comes
    assert connection.getresponse().status == 413
    connection.close()


def test_a_client_that_hangs_up(url, log):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=TIMEOUT)
    connection.request("POST", "/predict", PNG[:50], headers={"Content-Length": str(len(PNG)), "X-Request-ID": "gone"})
    connection.close()
    assert line_of(log, "gone")["status"] == 499
    assert not [line for line in lines_of(log) if line["level"] == "error"]
