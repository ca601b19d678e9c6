"""Another experiment's archive, served beside the flagship by one TorchServe."""

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import requests

from src.inference import Predictor
from src.models import ModelConfig, build_network, save_model
from src.models.classifier import ImageClassifier
from src.preprocessing import Preprocessing
from src.serving.management import Service
from src.serving.ports import free_ports
from src.serving.scaling import DRAINING
from tests.conftest import ROOT, RUNTIME, TIMEOUT, copy_checkout
from tests.drawing import GARMENTS, encode
from tests.image_folders import draw_photo_of
from tests.script_run import Run, bare_environment, pid_of, wait_until_none
from tests.test_rollout import operate
from tests.waiting import wait_until

SHIPPED = ("clothing_small", "flowers_small")
ARGS = {"widths": [8, 16], "dropout": 0.0}


@pytest.fixture(scope="module")
def beside(server, tmp_path_factory) -> Iterator[Run]:
    """A server of the flagship and of a colour network named ``fruits``, which nobody trained."""
    run = Run(
        copy_checkout(tmp_path_factory.mktemp("beside")),
        free_ports(3),
        bare_environment(tmp_path_factory.mktemp("tools")),
    )
    model = ImageClassifier(build_network("custom_cnn", 3, 4, **ARGS), [0.5] * 3, [0.25] * 3)
    card = ModelConfig("fruits", "custom_cnn", ARGS, list(GARMENTS), Preprocessing(40, 48, 3))
    save_model(run.root / "models" / "fruits" / "best_model", model, card)
    yield run
    run.script("--stop")


def test_an_archive_that_is_missing_is_named_with_the_command_that_makes_it(beside):
    done = beside.script("--native", "--ports", ",".join(map(str, beside.ports)), "--models", "fruits")
    assert done.returncode == 1
    assert "./create_mar_archive.sh --experiment fruits" in done.stderr
    missing = beside.create("--experiment", "nothing")
    assert missing.returncode == 1
    assert (
        "train it with: python src/training/train.py --config configs/config.yaml experiment=nothing" in missing.stderr
    )


def test_both_models_answer(beside):
    made = beside.create("--experiment", "fruits", "--runtime", "torch")
    assert made.returncode == 0, made.stderr
    done = beside.start("--native", "--models", "fruits")
    assert "fruits is ready" in done.stdout
    photo = encode(draw_photo_of("Bag", 3), "JPEG")
    url = f"http://127.0.0.1:{beside.ports[0]}/predictions/fruits"
    answer = requests.post(url, json={"image": base64.b64encode(photo).decode()}, timeout=TIMEOUT).json()
    expected = Predictor.load(beside.root / "models" / "fruits" / "best_model").predict([photo])[0]
    assert answer["predicted_label"] == expected.predicted_label
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert beside.predict().json()["predicted_label"] == "Trouser"
    before = pid_of(beside.root)
    assert f"process {before}" in beside.start("--native", "--models", "fruits").stdout, "a second run changes nothing"


def test_a_deployed_version_of_the_other_lasts(beside, tmp_path):
    before = pid_of(beside.root)
    made = beside.create("--experiment", "fruits", "--runtime", "torch", "--version", "2.0", "--output", "new")
    assert made.returncode == 0, made.stderr
    refused = operate(beside, "deploy", "new/fruits.mar", "--model", "fruits")
    assert refused.returncode == 1
    assert "T-shirt/top, in the golden set, is no class of the model" in refused.stderr
    photo, url = encode(draw_photo_of("Bag", 3), "PNG"), f"http://127.0.0.1:{beside.ports[0]}/predictions/fruits"
    (tmp_path / "photo.png").write_bytes(photo)
    label = requests.post(url, data=photo, timeout=TIMEOUT).json()["predicted_label"]
    (tmp_path / "labels.csv").write_text(f"filename,label\nphoto.png,{label}\n")
    deploy = ("deploy", "new/fruits.mar", "--model", "fruits", "--golden", tmp_path, "--watch", 1)
    deployed = operate(beside, *deploy)
    assert deployed.returncode == 0, deployed.stderr
    assert f"process {before}" in beside.start("--native", "--models", "fruits").stdout, "it is what is asked for"
    stopped = stop_while_the_flagship_hangs(beside)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("every request that was taken is answered") == 2
    wait_until_none(beside.root)
    beside.start("--native", "--models", "fruits")
    assert requests.post(url, data=photo, timeout=TIMEOUT).json()["model_version"] == "2.0"
    beside.script("--stop")
    wait_until_none(beside.root)


def stop_while_the_flagship_hangs(run: Run) -> subprocess.CompletedProcess:
    """``--stop``; the other model is drained meanwhile, and only then does the flagship's worker go on."""
    service = Service(management=f"http://127.0.0.1:{run.ports[1]}")
    worker = service.describe()["workers"][0]["pid"]
    with ThreadPoolExecutor(1) as other:
        os.kill(worker, signal.SIGSTOP)
        try:
            stopping = other.submit(run.script, "--stop")
            wait_until(lambda: replace(service, model="fruits").describe()["modelVersion"] == DRAINING)
        finally:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        return stopping.result()


def test_the_shipped_colour_models_answer_as_offline(beside):
    training = replace(beside, environment=beside.environment | {"PYTHON": sys.executable})  # it has timm
    for name in SHIPPED:
        made = training.create("--experiment", name)
        assert made.returncode == 0, made.stderr
    beside.start("--native", "--models", ",".join(SHIPPED))
    photos = [encode(draw_photo_of(kind, 7), "JPEG") for kind in GARMENTS]
    for name in SHIPPED:
        expected = Predictor.load(ROOT / "models" / name / "best_model", runtime=RUNTIME).predict(photos)
        for photo, wanted in zip(photos, expected, strict=True):
            url = f"http://127.0.0.1:{beside.ports[0]}/predictions/{name}"
            answer = requests.post(url, data=photo, timeout=TIMEOUT).json()
            assert answer["predicted_label"] == wanted.predicted_label
            assert answer["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-5)
    assert beside.predict().json()["predicted_label"] == "Trouser"
    beside.script("--stop")
    wait_until_none(beside.root)
