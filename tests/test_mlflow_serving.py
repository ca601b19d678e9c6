"""The MLflow server: the registered model, ``mlflow models serve`` and the commands, against a running TorchServe."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

from src.serving.mlflow_registry import register
from src.serving.mlflow_serving import main
from src.serving.ports import free_ports
from tests.conftest import ROOT, RUNTIME, run_script
from tests.drawing import encode
from tests.mlflow_service import COMMAND, FILES, PIXELS, TEXTS, assert_same, invoke, running_server
from tests.mlflow_store import new_store
from tests.sent_inputs import OTHER, PNG, as_base64, as_json

pytestmark = [
    # MLflow 3.17 says this of a class of its own while it is imported, in colours.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
    # It compares the columns of an input example with a range, which pandas 3 deprecates.
    pytest.mark.filterwarnings("ignore:Operation with range is deprecated:DeprecationWarning"),
]
BEST = ROOT / "models" / "best_model"
ELSEWHERE = """
import base64, json, sys
import mlflow.pyfunc, numpy as np, pandas as pd
model = mlflow.pyfunc.load_model("models:/fashion_mnist/1")
texts, pixels = json.load(sys.stdin)
found = model.predict(pd.DataFrame({"image": texts})), model.predict(np.array(pixels, np.uint8))
files = [module.__file__ for name, module in sys.modules.items() if name.startswith("src")]
print(json.dumps([files, *found]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """The address of an empty store."""
    return new_store(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("mlflow_serving"))


@pytest.fixture(scope="module")
def registered(store, checkout) -> str:
    """What ``register`` prints: the URI of the one version."""
    done = run_script(checkout, *COMMAND, "register", MLFLOW_TRACKING_URI=store)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def in_store(store, tmp_path, monkeypatch):
    """This process uses the store, and keeps its import path."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(sys, "path", sys.path[:])  # MLflow puts a model's code in front
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(store)
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def mlflow_server(registered, store, checkout, tmp_path_factory) -> str:
    """The address of a running server of the registered model."""
    log = tmp_path_factory.mktemp("mlflow_log") / "serve.log"
    with running_server(checkout, store, registered, log) as url:
        yield url


@pytest.fixture(scope="module")
def expected(server) -> list[dict]:
    """TorchServe's answers to FILES."""
    return server.predict(as_json(images=TEXTS)).json()


# ---- the registered model ----


def test_the_same_model_is_registered_once(registered, in_store, tmp_path):
    assert registered == "models:/fashion_mnist/1"
    assert register(BEST, "fashion_mnist", RUNTIME) == (registered, False)
    changed = shutil.copytree(BEST, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"uncertain_below": 0.9}))
    assert register(changed, None, RUNTIME) == ("models:/fashion_mnist/2", True)
    assert register(BEST, None, RUNTIME) == (registered, False)
    assert len(MlflowClient().search_model_versions("name = 'fashion_mnist'")) == 2


def test_the_model_says_what_it_takes_gives_and_needs(registered, in_store):
    info = mlflow.models.get_model_info(registered)
    assert info.signature.inputs.input_names() == ["image"]
    assert "predicted_label" in info.signature.outputs.input_names()
    assert info.saved_input_example_info["artifact_path"]
    needed = Path(mlflow.pyfunc.get_model_dependencies(registered)).read_text().split()
    pins = (ROOT / "torchserve" / "requirements.txt").read_text()
    assert {line.split("==")[0] for line in needed} == {
        "mlflow",
        "multipart",
        "numpy",
        "onnxruntime",
        "orjson",
        "pillow",
        "pyyaml",
    }
    assert all(line in pins for line in needed if not line.startswith("mlflow"))


def test_the_model_loads_without_the_checkout(registered, store, tmp_path, expected):
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE],
        input=json.dumps([TEXTS, PIXELS.tolist()]),
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"MLFLOW_TRACKING_URI": store},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    files, from_texts, from_pixels = json.loads(done.stdout.splitlines()[-1])
    assert files
    assert not [file for file in files if Path(file).is_relative_to(ROOT)]
    assert_same(from_texts, expected)
    assert_same(from_pixels, expected)


def test_a_network_that_needs_timm_is_registered_as_onnx_only(in_store):
    folder = ROOT / "models" / "flowers_small" / "best_model"
    with pytest.raises(ValueError, match="prototypes needs timm, which a server has not: give --runtime onnx-int8"):
        register(folder, None, "torch")


def test_the_torch_runtime_can_be_registered(in_store):
    uri, new = register(BEST, "with_torch", "torch")
    assert new
    answers = mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"image": TEXTS[:2]}))
    assert [answer["predicted_label"] for answer in answers] == ["T-shirt/top", "T-shirt/top"]


# ---- /invocations ----


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": TEXTS},
        {"inputs": {"image": TEXTS}},
        {"instances": [{"image": text} for text in TEXTS]},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in TEXTS]}},
        {"dataframe_records": [{"image": text} for text in TEXTS]},
        {"inputs": PIXELS.tolist()},
        {"inputs": {"image": PIXELS.tolist()}},
        {"instances": [{"image": image} for image in PIXELS.tolist()]},
    ],
    ids=["inputs", "named", "instances", "split", "records", "tensor", "named tensor", "tensor instances"],
)
def test_every_form_gets_the_answers_of_torchserve(body, mlflow_server, expected):
    answer = invoke(mlflow_server, **body)
    assert answer.status_code == 200, answer.text
    assert_same(answer.json()["predictions"], expected)


def test_more_images_than_go_through_the_network_at_once_keep_their_order(mlflow_server, expected):
    assert_same(invoke(mlflow_server, inputs=TEXTS * 20).json()["predictions"], expected * 20)


@pytest.mark.parametrize(
    "value", ["@@@@", "", 5, None, as_base64(b"hello"), as_base64(PNG[:60])], ids=lambda value: repr(value)[:12]
)
def test_what_is_no_image_is_refused_as_torchserve_refuses_it(value, mlflow_server, server):
    expected = server.predict(as_json(images=[value])).json()
    answer = invoke(mlflow_server, inputs=[value])
    assert answer.status_code == expected["code"] == 400
    assert {key: answer.json()[key] for key in expected} == expected


def test_a_bad_image_is_named_or_reported_in_its_row(mlflow_server, server):
    several = [TEXTS[0], as_base64(b"hello"), as_base64(encode(OTHER))]
    refused = invoke(mlflow_server, inputs=several)
    assert refused.status_code == 400
    assert refused.json()["message"] == server.predict(as_json(images=several)).json()["message"]
    assert TEXTS[0][:20] not in refused.text, "the client's images are not repeated"
    answers = invoke(mlflow_server, inputs=several, params={"bad_images": "report"}).json()["predictions"]
    assert [answer.get("type") for answer in answers] == [None, "not_an_image", None]
    assert answers[2]["predicted_label"] == "Bag"


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ({"inputs": (PIXELS / 255).tolist()}, "bad_tensor", "whole numbers from 0 to 255"),
        ({"inputs": (PIXELS.astype(int) + 1000).tolist()}, "bad_tensor", "whole numbers from 0 to 255"),
        ({"inputs": PIXELS[:, 0].tolist()}, "bad_tensor", "shape (8, 28, 28); send"),
        ({"inputs": [TEXTS[0], PIXELS[0].tolist()]}, "bad_base64", '"images[1]" is list'),
        ({"inputs": []}, "no_image", "there is no image"),
        ({"inputs": TEXTS, "params": {"bad_images": "skip"}}, "bad_params", "must be refuse or report"),
        ({"dataframe_split": {"columns": ["picture"], "data": [["a"]]}}, None, "missing inputs ['image']"),
    ],
)
def test_what_cannot_be_answered_gets_400_and_a_reason(body, kind, message, mlflow_server):
    answer = invoke(mlflow_server, **body)
    assert answer.status_code == 400
    assert answer.json().get("type") == kind
    assert message in answer.json()["message"]


# ---- the commands ----


def test_status_says_what_is_served(mlflow_server, capsys):
    assert main(["status", "--url", mlflow_server]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["registered_name"], found["model_version"]) == ("fashion_mnist", "1")
    assert (found["runtime"], found["mlflow"]) == (RUNTIME, mlflow.__version__)


def test_predict_prints_an_answer_a_file(mlflow_server, tmp_path, capsys, expected):
    (tmp_path / "good.png").write_bytes(FILES[0])
    (tmp_path / "bad.png").write_bytes(b"hello")
    assert main(["predict", "--url", f"{mlflow_server}/", str(tmp_path / "good.png")]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer.pop("filename") == str(tmp_path / "good.png")
    assert_same([answer], expected[:1])
    assert main(["predict", "--url", mlflow_server, *(str(tmp_path / name) for name in ("bad.png", "good.png"))]) == 1
    bad, good = json.loads(capsys.readouterr().out)
    assert (bad["type"], good["predicted_label"]) == ("not_an_image", answer["predicted_label"])
    names = ("missing.png", "good.png", ".")
    assert main(["predict", "--url", mlflow_server, *(str(tmp_path / name) for name in names)]) == 1
    missing, good, folder = json.loads(capsys.readouterr().out)
    assert (missing["code"], missing["type"], folder["type"]) == (400, "unreadable", "unreadable")
    assert good["predicted_label"] == answer["predicted_label"]
    assert main(["predict", "--url", mlflow_server, str(tmp_path / "missing.png")]) == 1
    assert "No such file" in json.loads(capsys.readouterr().out)[0]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "--url", "http://127.0.0.1:{closed}"], "nothing answers at http://127.0.0.1:{closed}"),
        (["status", "--url", "{torchserve}"], "/invocations answers 400: "),
        (["register", "--model-path", "nowhere"], "nowhere/config.json does not exist"),
        (["register", "--model-path", str(BEST), "--name", "a/b"], "'a/b'; use letters"),
        (["serve", "--model-uri", "models:/fashion_mnist/99"], "99"),
        (["serve", "--model-uri", "models:/absent/1"], "absent"),
        (["serve", "--model-uri", "{uri}", "--port", "{taken}"], "choose with --host and --port"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else value[:20],
)
def test_errors_name_the_value_and_the_remedy(arguments, message, registered, mlflow_server, server, in_store, capsys):
    names = {
        "closed": free_ports(1)[0],
        "taken": mlflow_server.rsplit(":", 1)[1],
        "torchserve": server.inference,
        "uri": registered,
    }
    assert main([item.format(**names) for item in arguments]) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert message.format(**names) in error


@pytest.mark.parametrize("port", ["0", "99999", "-1"])
def test_a_port_is_checked(port, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--model-uri", "models:/fashion_mnist/1", "--port", port])
    assert f"--port is {port}; it must lie between 1 and 65535" in capsys.readouterr().err


def test_an_address_is_checked(capsys):
    with pytest.raises(SystemExit):
        main(["status", "--url", "localhost:5001"])
    assert "'localhost:5001' is no address; give one such as http://" in capsys.readouterr().err
