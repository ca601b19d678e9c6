"""torchserve/handler.py in process, with TorchServe's own request and metrics classes: exact batches."""

import importlib.util
import json
import shutil
import socket
import struct
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import yaml
from ts.context import Context
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.protocol import otf_message_handler
from ts.protocol.otf_message_handler import retrieve_msg
from ts.service import Service

from benchmarks.stages import message
from src.inference.archive import save_archived_model
from src.inference.runtimes import FILES
from src.models import load_model
from tests.conftest import ROOT, RUNTIME
from tests.drawing import encode
from tests.sent_inputs import OTHER, PNG, as_base64, as_json, bad_bodies, json_forms, variants

BAD, VARIANTS = bad_bodies(), variants()
ANSWER_KEYS = {"predicted_class", "predicted_label", "confidence", "uncertain", "probabilities", "model_version"}


def raw(body: bytes, **headers: str) -> dict:
    """One request as TorchServe's frontend passes it on."""
    return fields({"body": body}, **headers)


def fields(parts: dict[str, bytes], **headers: str) -> dict:
    """One request with several fields, as a multipart form gives."""
    return {
        "requestId": b"1",
        "headers": [{"name": n.replace("_", "-").encode(), "value": v.encode()} for n, v in headers.items()],
        "parameters": [{"name": n, "value": bytearray(v), "contentType": "application/json"} for n, v in parts.items()],
    }


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = ROOT / "models" / "best_model"
    save_archived_model(folder, *load_model(model))
    for path in model.glob("*.onnx"):
        shutil.copy2(path, folder)
    return folder


@pytest.fixture(scope="module")
def ask(model_dir):
    """A function: requests of one batch -> [(status, parsed answer)], through one loaded handler."""
    return load_handler(model_dir, RUNTIME)


def load_handler(folder, runtime: str, **settings_of_handler):
    """What ``ask`` gives, for the unpacked archive in ``folder``, with these settings in its section ``handler``."""
    spec = importlib.util.spec_from_file_location("handler", ROOT / "torchserve" / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    metrics = MetricsCacheYamlImpl(str(ROOT / "torchserve" / "metrics.yaml"))
    metrics.initialize_cache()
    settings = yaml.safe_load((ROOT / "torchserve" / "model-config.yaml").read_text())
    settings["handler"] |= {"runtime": runtime, **settings_of_handler}
    manifest = {"model": {"modelVersion": "1.0"}}
    metrics.model_name = "fashion_mnist"
    context = Context("fashion_mnist", str(folder), manifest, 32, None, "0.12.0", True, metrics, settings)
    handler = module.ImageClassifierHandler()
    handler.initialize(context)

    def send(*requests: dict) -> list[tuple[int, object]]:
        headers, batch, ids = Service.retrieve_data_for_inference(requests)
        context.request_processor, context.request_ids = headers, ids
        metrics.request_ids = ids
        answers = handler.handle(batch, context)
        assert len(answers) == len(requests)
        kinds = {context.get_response_content_type(index) for index in range(len(requests))}
        assert kinds <= {"application/json"}
        return [(context.get_response_status(index)[0], json.loads(answer)) for index, answer in enumerate(answers)]

    send.handler = handler
    return send


@pytest.fixture(scope="module")
def expected(ask):
    """The answers for PICTURE and OTHER as raw PNG."""
    (_, picture), (_, other) = ask(raw(PNG), raw(encode(OTHER)))
    return SimpleNamespace(picture=picture, other=other)


def assert_same(answer: dict, wanted: dict) -> None:
    """Equal predictions; probabilities within 1e-5, for the size of a batch changes the rounding."""
    assert answer["predicted_label"] == wanted["predicted_label"]
    assert answer["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)


def test_the_answer(ask):
    [(status, answer)] = ask(raw(PNG))
    names = ask.handler.predictor.config.class_names
    assert status == 200
    assert answer.keys() == ANSWER_KEYS
    assert list(answer["probabilities"]) == names
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["confidence"] == max(answer["probabilities"].values())
    assert names[answer["predicted_class"]] == answer["predicted_label"]
    assert answer["probabilities"][answer["predicted_label"]] == answer["confidence"]
    assert answer["model_version"] == "1.0"


@pytest.mark.parametrize("form", json_forms())
def test_every_json_form(ask, expected, form):
    [(status, answer)] = ask(raw(json_forms()[form]))
    assert status == 200
    assert_same(answer, expected.picture)


@pytest.mark.parametrize("name", VARIANTS)
def test_special_files_are_read_as_their_plain_equivalent(ask, name):
    special, plain = VARIANTS[name]
    for request in (raw, lambda data: raw(as_json(image=as_base64(data)))):
        (status, answer), (_, wanted) = ask(request(special), raw(plain))
        assert status == 200
        assert_same(answer, wanted)


def test_several_images_answer_a_list_in_order(ask, expected):
    texts = [as_base64(PNG), as_base64(encode(OTHER)), as_base64(PNG)]
    [(status, answers), (_, one)] = ask(raw(as_json(images=texts)), raw(as_json(images=texts[:1])))
    assert status == 200
    for answer, wanted in zip(answers, [expected.picture, expected.other, expected.picture], strict=True):
        assert_same(answer, wanted)
    assert isinstance(one, list)
    assert len(one) == 1


def test_forms(ask, expected):
    form = {"first": PNG, "second": encode(OTHER)}
    (_, one), (_, two), (_, text) = ask(
        fields({"any name": PNG}), fields(form), fields({"data": as_json(image=as_base64(PNG))})
    )
    assert_same(one, expected.picture)
    assert_same(two[0], expected.picture)
    assert_same(two[1], expected.other)
    assert_same(text, expected.picture)
    [(status, error)] = ask(fields({str(number): PNG for number in range(65)}))
    assert (status, error["type"]) == (400, "too_many")
    [(status, error)] = ask(fields({}))
    assert (status, error["type"]) == (400, "empty")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_refused_and_disturbs_no_other_of_its_batch(ask, expected, name):
    body, reasons, part = BAD[name]
    batch = [raw(PNG), raw(body), raw(as_json(images=[as_base64(encode(OTHER)), as_base64(PNG)])), fields({"x": body})]
    for first in (0, 1):  # the bad one inside the batch, and at its start
        answers = ask(*batch[first:])[1 - first :]
        status, error = answers[0]
        assert status == 400
        assert error.keys() == {"code", "type", "message"}
        assert error["code"] == 400
        assert error["type"] in reasons
        assert part in error["message"]
        assert_same(answers[1][1][0], expected.other)
        assert_same(answers[1][1][1], expected.picture)
        assert answers[2] == (400, error)


def test_a_batch_that_takes_long_refuses_large_images_and_then_all(ask, expected, monkeypatch):
    small = encode(OTHER.resize((10, 10)))
    monkeypatch.setattr("src.inference.requests.LIMITS", ((3600.0, 100),))
    (status, error), (other, _) = ask(raw(as_json(images=[as_base64(small), as_base64(PNG)])), raw(small))
    assert (status, error["code"], error["type"], other) == (503, 503, "busy", 200)
    monkeypatch.setattr("src.inference.requests.LIMITS", ((0.0, 100),))
    assert [(status, error["type"]) for status, error in ask(raw(small), raw(PNG))] == [(503, "busy")] * 2
    monkeypatch.undo()
    [(status, answer)] = ask(raw(PNG))
    assert_same(answer, expected.picture)


def test_a_batch_of_every_bad_input_keeps_each_answer_with_its_request(ask, expected):
    batch = [item for body, _, _ in BAD.values() for item in (raw(body), raw(PNG))]
    answers = ask(*batch)
    for (status, error), (_, reasons, part) in zip(answers[::2], BAD.values(), strict=True):
        assert status == 400
        assert error["type"] in reasons
        assert part in error["message"]
    for status, answer in answers[1::2]:
        assert status == 200
        assert_same(answer, expected.picture)


def test_describe(ask, model_dir):
    [(status, answer)] = ask(fields({}, describe="True"))
    config = asdict(ask.handler.predictor.config)
    assert status == 200
    assert answer["class_names"] == config["class_names"]
    assert answer["metrics"] == config["metrics"]
    assert answer["runtime"] == RUNTIME
    assert answer["sha256"].keys() == {"model.pt", "model_config.json", FILES[RUNTIME]}
    assert answer["versions"].keys() == {"onnxruntime", "torchserve", "numpy"}


def test_a_client_cannot_ask_for_the_description(ask, expected):
    form = {"Content_Type": "multipart/form-data; boundary=x"}
    answers = ask(
        raw(PNG, describe="True"),
        fields({"x": PNG}, describe="True", **form),
        fields({}, describe="True", **form),
        raw(b"", describe="True"),
        fields({"describe": PNG}),
    )
    assert [status for status, _ in answers] == [200, 200, 400, 400, 200]
    for index in (0, 1, 4):
        assert_same(answers[index][1], expected.picture)


def test_holding_a_worker(ask):
    started = time.time()
    [(status, _)] = ask(fields({}, describe="True", hold_until=str(started + 0.3)))
    assert status == 200
    assert time.time() >= started + 0.3
    [(status, error)] = ask(fields({}, describe="True", hold_until="soon"))
    assert (status, error["type"]) == (400, "bad_header")
    [(status, _)] = ask(raw(PNG, hold_until=str(time.time() + 100)))  # a client cannot
    assert status == 200
    assert time.time() < started + 100


def test_a_worker_that_is_told_to_refuses_what_follows(model_dir):
    ask = load_handler(model_dir, RUNTIME)
    [(status, _)] = ask(raw(PNG, describe="True", refuse="True"))  # a client cannot tell it
    assert status == 200
    [(status, _), (before, _)] = ask(fields({}, describe="True"), raw(PNG))
    assert (status, before) == (200, 200)
    [(status, _)] = ask(fields({}, describe="True", refuse="True", hold_until="0"))  # late, so it is not held
    assert status == 200
    [(status, error)] = ask(raw(PNG))
    assert (status, error["type"]) == (503, "busy")
    assert "this server stops" in error["message"]


def framed(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


def test_batches_are_read_whole_however_they_arrive(ask):
    """Two batches in TorchServe's frames, in pieces that fit no field; then the frontend closes the connection."""
    end = struct.pack("!i", -1)
    request = (
        framed(b"id") + framed(b"accept") + framed(b"*/*") + end + framed(b"body") + framed(b"") + framed(PNG) + end
    )
    stream = (b"I" + request * 3 + end) * 2
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(
            target=lambda: [theirs.sendall(stream[at : at + 7]) for at in range(0, len(stream), 7)]
        )
        sender.start()
        batches = [retrieve_msg(ours) for _ in range(2)]
        sender.join(timeout=30)
        for command, batch in batches:
            assert command == b"I"
            assert [status for status, _ in ask(*batch)] == [200] * 3
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(SystemExit):
            retrieve_msg(ours)


def test_a_batch_is_read_as_torchserve_reads_it(ask, monkeypatch):
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    untouched = importlib.util.module_from_spec(otf_message_handler.__spec__)
    otf_message_handler.__spec__.loader.exec_module(untouched)
    sent = message([PNG, b"", b"\x00\xff" * 40_000], "image/png")
    read = []
    for reader in (untouched.retrieve_msg, retrieve_msg):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            threading.Thread(target=theirs.sendall, args=(sent,), daemon=True).start()
            read.append(reader(ours))
    assert read[0] == read[1]


@pytest.mark.parametrize("cut", [1, 3, 30, 45, -1])
def test_a_frontend_that_goes_in_the_middle_of_a_batch_ends_the_worker(ask, cut):
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(message([PNG], "image/png")[:cut])
        theirs.close()
        with pytest.raises(SystemExit):
            retrieve_msg(ours)
